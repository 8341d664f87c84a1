"""How the keys of a table folder lie: 0 to rows - 1, or scattered."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from ..errors import DataLossError

READ_WHOLE_ROWS = 8 << 20  # of larger files blocks spread over the file are read
_BLOCKS = 1024
_BLOCK_ROWS = 1024
_CHUNK_ROWS = 1 << 20


@dataclasses.dataclass(frozen=True)
class KeyRange:
    """Of the first `rows` rows of a folder: how many keys are below `rows`. sampled: estimated."""

    rows: int
    dense_rows: int
    sampled: bool


def look_at_keys(folder: Path, rows: int) -> KeyRange:
    """Reads keys of the first `rows` rows; the file is not mapped, it may shrink meanwhile."""
    if rows <= 0:
        return KeyRange(0, 0, False)
    sampled = rows > READ_WHOLE_ROWS
    seen = dense = 0
    with open(folder / "key", "rb") as file:
        spread = np.linspace(0, rows - _BLOCK_ROWS, _BLOCKS, dtype=np.int64)
        for first in spread if sampled else range(0, rows, _CHUNK_ROWS):
            wanted = _BLOCK_ROWS if sampled else min(_CHUNK_ROWS, rows - first)
            data = os.pread(file.fileno(), wanted * 8, int(first) * 8)
            if len(data) != wanted * 8:
                raise DataLossError(f"{folder / 'key'} was changed while it was read; try again")
            keys = np.frombuffer(data, "<u8")
            seen += wanted
            dense += int((keys < rows).sum())
    return KeyRange(rows, dense if not sampled else round(rows * dense / seen), sampled)
