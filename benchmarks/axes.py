"""What is measured: every axis and every default of the harness stands here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

FORMS = ("dense", "sparse")  # sparse: the rows of one sample are combined
CALLS = ("function", "eager")  # through tf.function, or op by op
COMBINER = "mean"
ZIPF_EXPONENT = 1.05
SEED = 20_240_601


@dataclass(frozen=True)
class Axes:
    """One run: the cases are the product of the tuples.

    A batch counts samples; a dense sample has one id, a sparse one ``ids_per_sample``.
    """

    rows: int = 1_000_000  # of each table
    widths: tuple[int, ...] = (16, 64, 128)
    forms: tuple[str, ...] = FORMS
    distributions: tuple[str, ...] = ("uniform", "zipf")
    batches: tuple[int, ...] = (1, 64, 1_024, 4_096, 16_384, 65_536)
    calls: tuple[str, ...] = CALLS
    ids_per_sample: int = 16
    # Fresh ids: a case cycles through as many batches as this many ids make.
    pool_ids: int = 1 << 21
    pool_batches: int = 256
    # A case is measured for so long, but within these numbers of rounds.
    seconds_per_case: float = 1.0
    min_rounds: int = 21
    max_rounds: int = 2_000
    # Loading: a folder of so many bytes, so many times, each in a process of its own.
    load_folder_bytes: int = 1 << 31
    load_width: int = 16
    load_repeats: int = 3
    load_goal_rows_per_second: float = 5e6
    load_goal_memory_ratio: float = 1.1


FULL = Axes()
QUICK = Axes(
    rows=3_000,
    widths=(16,),
    batches=(1, 64),
    pool_ids=1 << 12,
    pool_batches=4,
    seconds_per_case=0.0,
    min_rounds=5,
    max_rounds=5,
    load_folder_bytes=1 << 20,
    load_repeats=1,
)
