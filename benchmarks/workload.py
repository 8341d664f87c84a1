"""Tables and ids: what the peers are given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .axes import SEED, ZIPF_EXPONENT, Axes

MODEL = "benchmark"
CHUNK_ROWS = 1 << 20


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    form: str
    distribution: str
    width: int
    batch: int
    call: str

    def ids_per_call(self, axes: Axes) -> int:
        return self.batch * (axes.ids_per_sample if self.form == "sparse" else 1)


def cases(axes: Axes, width: int) -> Iterator[Case]:
    for form in axes.forms:
        for distribution in axes.distributions:
            for batch in axes.batches:
                for call in axes.calls:
                    yield Case(form, distribution, width, batch, call)


def scatter(ids: np.ndarray) -> np.ndarray:
    """Distinct keys for distinct ids, all over the range of int64, as feature hashing makes them."""
    return (ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


class TableData:
    """Random rows for the ids 0 .. rows - 1, in memory and, once asked for, as a model folder with its ps.json."""

    def __init__(self, rows: int, width: int, folder: Path):
        self.width = width
        self.values = np.random.default_rng(SEED + width).random((rows, width), dtype=np.float32)
        self._folder = folder / f"width_{width}"

    @cached_property
    def config_path(self) -> Path:
        """The keys are the ids."""
        return self._write("table", np.arange(len(self.values), dtype=np.int64))

    @cached_property
    def scattered_config_path(self) -> Path:
        """The keys are the scattered ids."""
        return self._write("scattered", scatter(np.arange(len(self.values))))

    def _write(self, name: str, keys: np.ndarray) -> Path:
        table = self._folder / name
        table.mkdir(parents=True)
        keys.tofile(table / "key")
        self.values.tofile(table / "emb_vector")
        return write_config(self._folder / f"{name}.json", table, self.width)


def write_config(path: Path, table: Path, width: int) -> Path:
    """A ps.json with one table, served from the hash map."""
    model = {
        "model": MODEL,
        "sparse_files": [str(table)],
        "embedding_vecsize_per_table": [width],
        "maxnum_catfeature_query_per_table_per_sample": [1],
        "default_value_for_each_table": [0.0],
        "deployed_device_list": [0],
        "max_batch_size": 65_536,
        "gpucache": False,
    }
    config = {"supportlonglong": True, "models": [model], "volatile_db": {"type": "parallel_hash_map"}}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


class IdSource:
    """Draws ids in [0, rows); popular ids of the Zipf distribution are scattered over the table."""

    def __init__(self, rows: int, distribution: str):
        self._rows = rows
        self._random = np.random.default_rng(SEED)
        self._cumulative = None
        if distribution == "zipf":
            weights = np.arange(1, rows + 1, dtype=np.float64) ** -ZIPF_EXPONENT
            self._cumulative = np.cumsum(weights / weights.sum())
            self._id_of_rank = self._random.permutation(rows)
        elif distribution != "uniform":
            raise ValueError(f"unknown distribution {distribution!r}; use 'uniform' or 'zipf'")

    def draw(self, count: int) -> np.ndarray:
        if self._cumulative is None:
            return self._random.integers(0, self._rows, count, dtype=np.int64)
        ranks = np.searchsorted(self._cumulative, self._random.random(count))
        return self._id_of_rank[np.minimum(ranks, self._rows - 1)]


def draw_batches(case: Case, axes: Axes) -> list[np.ndarray]:
    """Batches of ids, int64 [ids per call]."""
    ids = case.ids_per_call(axes)
    count = max(2, min(axes.pool_batches, axes.pool_ids // ids))
    source = IdSource(axes.rows, case.distribution)
    return [source.draw(ids) for _ in range(count)]


# The folder for the load benchmark: every value of a row follows from its number, so nothing has to be remembered.


def load_keys(first: int, last: int) -> np.ndarray:
    return scatter(np.arange(first, last))


def load_values(first: int, last: int, width: int) -> np.ndarray:
    values = np.arange(first * width, last * width, dtype=np.int64) & 0xFFFFFF  # whole numbers that float32 can hold
    return values.astype(np.float32).reshape(-1, width)


def write_load_folder(folder: Path, rows: int, width: int) -> None:
    folder.mkdir(parents=True)
    with open(folder / "key", "wb") as keys, open(folder / "emb_vector", "wb") as vectors:
        for first in range(0, rows, CHUNK_ROWS):
            last = min(rows, first + CHUNK_ROWS)
            load_keys(first, last).tofile(keys)
            load_values(first, last, width).tofile(vectors)
