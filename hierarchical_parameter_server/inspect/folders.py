"""Table folders: `key` (int64) and `emb_vector` (float32), the predecessor's format."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .. import _native
from ..errors import DataLossError, FailedPreconditionError, HpsError, InvalidArgumentError, NotFoundError
from .report import SAMPLE_ROWS, Report, Sample, Table

KEYS, ROWS = "key", "emb_vector"


def is_table_folder(folder: Path) -> bool:
    """Whether it has one of a table's files."""
    return (folder / KEYS).exists() or (folder / ROWS).exists()


def table_folders_in(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and is_table_folder(child)]


def inspect_table_folder(folder: Path, shown: int, width: int | None = None) -> Table:
    """One folder; its width is worked out from the sizes of the files where it is not given.

    Raises:
        HpsError: what a load of the folder would raise: files that are missing, empty, truncated or do not fit.
    """
    if width is None:
        width = _width(folder)
    fingerprint = _native.fingerprint_table_folder(str(folder), width)  # makes the checks of a load
    rows = (folder / KEYS).stat().st_size // 8
    table = Table(
        name=str(folder),
        table=folder.name,
        rows=rows,
        bytes=sum((folder / name).stat().st_size for name in (KEYS, ROWS)),
        row_bytes=width * 4,
        key_bytes=8,
        fingerprint=fingerprint,
    )
    places = np.unique(np.linspace(0, rows - 1, min(rows, SAMPLE_ROWS), dtype=np.int64))
    keys = _read_rows(folder / KEYS, np.dtype("<i8"), places, 1)[:, 0]
    values = _read_rows(folder / ROWS, np.dtype("<f4"), places, width)
    if shown and len(places) > shown:  # spread over the file, as the sample is
        first = np.linspace(0, len(places) - 1, shown, dtype=np.int64)
        order = np.concatenate([first, np.setdiff1d(np.arange(len(places)), first)])
        keys, values = keys[order], values[order]
    table.sample = Sample.of(keys, values, shown)
    return table


def inspect_folders(folder: Path, shown: int) -> Report:
    """A table folder, or a folder of table folders: damaged ones among several are problems of the report."""
    if is_table_folder(folder):
        return Report("folder", str(folder), f"table folder {folder}", tables=[inspect_table_folder(folder, shown)])
    children = table_folders_in(folder)
    if not children:
        raise NotFoundError(
            f"{folder} is no table folder (files {KEYS} and {ROWS}), has none in it, and is no RocksDB database (a "
            f"file CURRENT)"
        )
    report = Report("folder", str(folder), f"folder of {len(children)} table folders {folder}")
    for child in children:
        try:
            report.tables.append(inspect_table_folder(child, shown))
        except (HpsError, OSError) as error:
            report.tables.append(Table(name=str(child), table=child.name, problems=[str(error)]))
    report.others = [entry.name for entry in sorted(folder.iterdir()) if entry not in children]
    return report


def _width(folder: Path) -> int:
    sizes = {}
    for name in (KEYS, ROWS):
        path = folder / name
        try:
            sizes[name] = path.stat().st_size
        except FileNotFoundError:
            raise NotFoundError(f"{path} does not exist; a table folder holds the files {KEYS} and {ROWS}") from None
        except PermissionError as error:
            raise FailedPreconditionError(f"{path}: {error.strerror}") from error
        if not path.is_file():
            raise InvalidArgumentError(f"{path} is not a file")
        if not sizes[name]:
            raise DataLossError(f"{path} is empty; export the model again")
    if sizes[KEYS] % 8:
        raise DataLossError(
            f"{folder / KEYS} has {sizes[KEYS]} bytes, no multiple of 8: it is truncated, or its keys are not int64"
        )
    rows = sizes[KEYS] // 8
    if sizes[ROWS] % (rows * 4):
        raise DataLossError(
            f"{folder / ROWS} has {sizes[ROWS]} bytes, which {rows} rows of float32 values cannot have, and "
            f"{folder / KEYS} has {rows} keys: one of them is truncated, or they do not belong together"
        )
    return sizes[ROWS] // (rows * 4)


def _read_rows(path: Path, dtype: np.dtype, places: np.ndarray, width: int) -> np.ndarray:
    """The rows at `places`, read one by one: the file is not mapped, it may shrink meanwhile."""
    row_bytes = width * dtype.itemsize
    with open(path, "rb") as file:
        data = [os.pread(file.fileno(), row_bytes, int(place) * row_bytes) for place in places]
    if any(len(row) != row_bytes for row in data):
        raise DataLossError(f"{path} was changed while it was read; try again")
    return np.frombuffer(b"".join(data), dtype).reshape(len(places), width)
