"""Names and records in databases, ours and the predecessor's: reading them only.

The formats are those of cc/core/model_record.h and docs/design/0002-rocksdb-store.md, 0003-tiers-and-models.md.
"""

from __future__ import annotations

import dataclasses
import re

from ..errors import DataLossError

RECORD_PREFIX = "hps.record/"  # of the names under which stores keep records
MODEL_RECORD_PREFIX = "hps.model."  # of records that say which generation of a model's tables is current
LOAD_CLAIM_PREFIX = "hps.load."  # of records by which a node says that it is loading a model
RECORD_FIRST_LINE = "hps model record "
RECORD_VERSIONS = ("1", "2")  # 2: shared volatile stores that a load gave only some rows of a table

_PART = r"[A-Za-z0-9_\-]{1,120}"
_TABLE = re.compile(rf"(?P<prefix>hps_et|hctr_et)\.(?P<model>{_PART})\.(?P<table>{_PART})(@(?P<n>[1-9]\d*))?")


@dataclasses.dataclass(frozen=True)
class StoredName:
    """The parts of `hps_et.<model>.<table>[@<generation>]`; `hctr_et.` is the predecessor's prefix before 3.5."""

    stored: str
    model: str
    table: str
    generation: int
    old_prefix: bool


def parse_table_name(stored: str) -> StoredName | None:
    """None where it is no table's name."""
    match = _TABLE.fullmatch(stored)
    if not match:
        return None
    return StoredName(stored, match["model"], match["table"], int(match["n"] or 0), match["prefix"] == "hctr_et")


@dataclasses.dataclass(frozen=True)
class TableRecord:
    """What a model's record says of one table.

    An empty fingerprint: its first load has not ended. all_rows: of so many, about, the load put `rows` in; 0: of all.
    """

    generation: int
    rows: int
    fingerprint: str
    all_rows: int = 0


def parse_model_record(value: bytes, where: str) -> dict[str, TableRecord]:
    """The tables of a model's record. DataLossError, with `where`, for a text or version that is not known."""
    text = value.decode("utf-8", "replace")
    lines = text.split("\n")
    version = lines[0].removeprefix(RECORD_FIRST_LINE)
    if version not in RECORD_VERSIONS:
        if lines[0].startswith(RECORD_FIRST_LINE):
            raise DataLossError(
                f"{where} has the format version {version!r}, and this program knows {' and '.join(RECORD_VERSIONS)}: "
                f"it was written by another version; use that one, or load the model anew"
            )
        raise DataLossError(f"{where} is no record of a model (it begins with {text[:32]!r})")
    tables = {}
    numbers = 2 if version == "1" else 3
    for line in lines[1:-1]:
        parts = line.split("\t", numbers + 1)
        if len(parts) != numbers + 2 or not all(part.isdigit() for part in parts[:numbers]):
            raise DataLossError(f"{where} cannot be understood: {line[:80]!r}")
        generation, rows, *all_rows = map(int, parts[:numbers])
        tables[parts[numbers]] = TableRecord(generation, rows, parts[numbers + 1], *all_rows)
    if lines[-1]:
        raise DataLossError(f"{where} ends in the middle of a line")
    return tables


_MASK = 2**64 - 1


def _rotate_right(value: int, bits: int) -> int:
    return ((value >> bits) | (value << (64 - bits))) & _MASK


def partition_of(key: bytes, num_partitions: int) -> int:
    """The partition of Redis where the raw bytes of a key belong (the predecessor's rule since 4.2)."""
    x = int.from_bytes(key, "little")
    x ^= _rotate_right(x, 25) ^ _rotate_right(x, 50)
    x = x * 0xA24BAED4963EE407 & _MASK
    x ^= _rotate_right(x, 24) ^ _rotate_right(x, 49)
    x = x * 0x9FB21C651E98DF25 & _MASK
    return (x ^ (x >> 28)) % num_partitions
