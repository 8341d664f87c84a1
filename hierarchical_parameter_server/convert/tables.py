"""Tables on their way from a model to `key` / `emb_vector` folders.

A `Table` reads its rows in slices, so that the writer never holds more than one chunk beside what the source itself
keeps in memory.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable

import numpy as np

CHUNK_BYTES = 16 << 20
MAX_NAME_LENGTH = 120

Progress = Callable[[str, int, int], None]
"""Called as `progress(table_name, rows_done, rows)` after each chunk."""


@dataclasses.dataclass(frozen=True)
class Table:
    """An embedding table in its source.

    Attributes:
        source: layer or variable name, for messages and the report.
        rows, width: shape of the table.
        dtype: numpy dtype of the values (bfloat16 is that of ml_dtypes).
        read: `read(start, stop)` returns rows start .. stop - 1 as an array of shape [stop - start, width].
        keys_per_sample: ids looked up for one sample, as far as the model's shapes tell.
    """

    source: str
    rows: int
    width: int
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]
    keys_per_sample: int = 1


def is_float(dtype: np.dtype) -> bool:
    """Whether tables of this type can be written (float64 only on request, see `check_dtype`)."""
    return dtype.name in ("float16", "bfloat16", "float32", "float64")


def check_dtype(table: Table, narrow_float64: bool) -> None:
    """Refuses what float32 rows cannot hold exactly.

    Raises:
        ValueError: for float64 unless `narrow_float64`, and for anything that is no floating-point type.
    """
    if not is_float(table.dtype):
        raise ValueError(f"{table.source}: {table.dtype} values are no embedding; rows must be floating point")
    if table.dtype.name == "float64" and not narrow_float64:
        raise ValueError(
            f"{table.source}: the values are float64 and rows are float32, so precision would be lost; "
            "pass narrow_float64=True (--narrow-float64) to accept that"
        )


def legal_name(name: str, fallback: str) -> str:
    """`name` made to fit the grammar of model and table names, [a-zA-Z0-9_-]{1,120}."""
    return re.sub(r"[^a-zA-Z0-9_-]+", "_", name).strip("_")[:MAX_NAME_LENGTH] or fallback


def table_names(sources: Iterable[str]) -> list[str]:
    """Legal names that differ even when case is ignored: the tables become folders.

    A name that is taken gets the suffix _2, _3, ...
    """
    taken: set[str] = set()
    names = []
    for source in sources:
        name = base = legal_name(source, "table")
        number = 1
        while name.lower() in taken:
            number += 1
            suffix = f"_{number}"
            name = base[: MAX_NAME_LENGTH - len(suffix)] + suffix
        taken.add(name.lower())
        names.append(name)
    return names


def write_table(folder: pathlib.Path, name: str, table: Table, progress: Progress | None) -> int:
    """Writes `folder/key` (int64) and `folder/emb_vector` (float32), both little-endian; keys are 0 .. rows - 1.

    Returns:
        The number of rows that hold a NaN.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    folder.mkdir(parents=True)
    chunk_rows = max(1, CHUNK_BYTES // (4 * table.width))
    nan_rows = 0
    with open(folder / "key", "wb") as key_file, open(folder / "emb_vector", "wb") as row_file:
        for start in range(0, table.rows, chunk_rows):
            stop = min(start + chunk_rows, table.rows)
            with np.errstate(over="ignore"):
                chunk = np.ascontiguousarray(table.read(start, stop).astype("<f4", copy=False))
            if chunk.shape != (stop - start, table.width):
                raise ValueError(f"{table.source}: read {chunk.shape} instead of {(stop - start, table.width)}")
            nan_rows += int(np.isnan(chunk).any(axis=1).sum())
            row_file.write(memoryview(chunk).cast("B"))
            key_file.write(memoryview(np.arange(start, stop, dtype="<i8")).cast("B"))
            if progress is not None:
                progress(name, stop, table.rows)
    return nan_rows
