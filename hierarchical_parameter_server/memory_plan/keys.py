"""How the keys of a table folder lie: 0 to rows - 1, or scattered."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from .. import _native

READ_WHOLE_ROWS = 8 << 20  # of larger files blocks spread over the file are read


@dataclasses.dataclass(frozen=True)
class KeyRange:
    """Of the first `rows` rows of a folder: how many keys are below `rows` (sampled: estimated), and whether others are
    among the first 1/16 of the rows."""

    rows: int
    dense_rows: int
    sampled: bool
    others_early: bool


def look_at_keys(folder: Path, rows: int) -> KeyRange:
    return KeyRange(rows, *_native.count_dense_keys(os.fspath(folder), rows, READ_WHOLE_ROWS))
