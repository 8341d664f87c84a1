"""What an inspection found: plain data, as text for people and as a dict for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..units import bytes_text, count_text, text_table
from .stored_names import StoredName, TableRecord

SAMPLE_ROWS = 1000  # looked at for values that are not numbers, and for rows of another size
SHOWN_VALUES = 4

CURRENT = "current"  # the generation that the model's record names
SUPERSEDED = "superseded"  # another generation: an old one, or one that is being loaded
INCOMPLETE = "incomplete"  # its first load has not ended, or was cut short
NOT_RECORDED = "not recorded"  # no record names it: another program wrote it


@dataclasses.dataclass
class Sample:
    """Some rows of a table. `values` holds the first values of the rows that are shown."""

    rows: int = 0  # that were looked at
    rows_with_nan: int = 0
    rows_with_infinity: int = 0
    keys: list[int] = dataclasses.field(default_factory=list)
    values: list[list[float]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, keys: Sequence[int], rows: np.ndarray, shown: int) -> Sample:
        """`rows`: float32 [n, width]."""
        return cls(
            rows=len(keys),
            rows_with_nan=int(np.isnan(rows).any(axis=1).sum()) if len(keys) else 0,
            rows_with_infinity=int(np.isinf(rows).any(axis=1).sum()) if len(keys) else 0,
            keys=[int(key) for key in keys[:shown]],
            values=[[float(value) for value in row[:SHOWN_VALUES]] for row in rows[:shown]],
        )


@dataclasses.dataclass
class Table:
    """One stored table. None: not known."""

    name: str  # as it is stored
    model: str = ""
    table: str = ""
    generation: int = 0
    state: str = ""
    rows: int | None = None
    rows_exact: bool = True
    bytes: int | None = None
    bytes_exact: bool = True
    row_bytes: int | None = None
    key_bytes: int | None = None
    partitions: int | None = None
    access_rows: int | None = None  # Redis: rows whose last or how frequent use is kept
    fingerprint: str = ""
    recorded_rows: int | None = None
    left_out_of: int = 0  # Redis: a load put only some of so many rows in
    bounded: bool = False  # Redis: it gives up rows by itself (overflow_margin)
    sample: Sample = dataclasses.field(default_factory=Sample)
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def width(self) -> int | None:
        return None if self.row_bytes is None or self.row_bytes % 4 else self.row_bytes // 4

    @classmethod
    def stored(cls, name: StoredName, records: dict[str, dict[str, TableRecord]]) -> Table:
        """A table of a database, with what the records say of it."""
        table = cls(name.stored, name.model, name.table, name.generation)
        record = records.get(name.model, {}).get(name.table)
        if name.old_prefix:
            table.notes.append("written by the predecessor before version 3.5 (prefix hctr_et)")
        if record is None:
            table.state = NOT_RECORDED
        elif record.generation != name.generation:
            table.state = SUPERSEDED
        elif not record.fingerprint:
            table.state = INCOMPLETE
        else:
            table.state, table.fingerprint, table.recorded_rows = CURRENT, record.fingerprint, record.rows
            table.left_out_of = record.all_rows
        return table

    def take_sample(self, keys: list[bytes], rows: list[bytes], shown: int) -> None:
        """Fills in sizes and the sample out of raw keys and rows."""
        if not keys:
            return
        self.key_bytes, self.row_bytes = len(keys[0]), len(rows[0])
        other_keys = {len(key) for key in keys} - {self.key_bytes}
        other_rows = {len(row) for row in rows} - {self.row_bytes}
        if other_keys or self.key_bytes not in (4, 8):
            sizes = sorted({self.key_bytes} | other_keys)
            self.problems.append(f"keys of {', '.join(map(str, sizes))} bytes; tables have keys of 8, or all of 4")
        if other_rows or self.row_bytes == 0 or self.row_bytes % 4:
            sizes = sorted({self.row_bytes} | other_rows)
            self.problems.append(
                f"rows of {', '.join(map(str, sizes))} bytes; the rows of a table are float32 values, equally many"
            )
        if not self.problems:
            values = np.frombuffer(b"".join(rows), "<f4").reshape(len(rows), -1)
            self.sample = Sample.of([int.from_bytes(key, "little", signed=True) for key in keys], values, shown)

    def compare_rows(self, remedy: str) -> None:
        """Holds a count, which is exact, against what the record says the table held when its load had ended."""
        recorded = self.recorded_rows or 0  # 0: not known
        if self.rows < recorded:
            self.problems.append(
                f"rows are lost: it holds {self.rows} of the {recorded} that it held when it was loaded "
                f"({recorded - self.rows} are missing); {remedy}"
            )
        elif recorded and self.rows > recorded:
            self.notes.append(f"it held {recorded} rows when it was loaded; the others came later")

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "width": self.width}


@dataclasses.dataclass
class Report:
    """What one place holds. `parts`: the places that a configuration names."""

    kind: str  # "folder", "rocks_db", "redis", "multi_process_hash_map", "config"
    place: str
    title: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # about the server or database as a whole
    tables: list[Table] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)  # what is there of other programs
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    parts: list[Report] = dataclasses.field(default_factory=list)

    def all_problems(self) -> list[str]:
        """The problems of the place, its tables and its parts."""
        of_tables = [f"{table.name}: {problem}" for table in self.tables for problem in table.problems]
        return self.problems + of_tables + [problem for part in self.parts for problem in part.all_problems()]

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Values that are not numbers become the strings "NaN", "Infinity" and "-Infinity"."""
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("title", "tables", "parts")
        }
        own["tables"] = [table.to_dict() for table in self.tables]
        own["parts"] = [part.to_dict() for part in self.parts]
        return _plain(own)

    def to_text(self) -> str:
        lines = [self.title]
        lines += [f"  {name.replace('_', ' ')}: {_fact(value)}" for name, value in self.facts.items()]
        if self.tables:
            lines += ["", *_listing(self.tables)]
        elif not self.parts:
            lines += ["", "no tables"]
        for table in self.tables:
            lines += _details(table)
        if self.others:
            lines += ["", f"of other programs, not looked at: {', '.join(self.others)}"]
        for part in self.parts:
            lines += ["", part.to_text()]
        for title, entries in (("notes", self.notes), ("problems", self.problems)):
            if entries:
                lines += ["", title, *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not np.isfinite(value):
        return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _plain(element) for key, element in value.items()}
    return [_plain(element) for element in value] if isinstance(value, list) else value


def _fact(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _listing(tables: list[Table]) -> list[str]:
    head = ["model", "table", "generation", "state", "rows", "bytes", "width", "key"]
    lines = []
    for table in tables:
        lines.append(
            [
                table.model,
                table.table or table.name,
                f"@{table.generation}" if table.generation else "",
                table.state,
                "?" if table.rows is None else ("" if table.rows_exact else "~") + count_text(table.rows),
                "?" if table.bytes is None else ("" if table.bytes_exact else "~") + bytes_text(table.bytes),
                "?" if table.width is None else str(table.width),
                "?" if table.key_bytes is None else f"{table.key_bytes} B",
            ]
        )
    used = [i for i in range(len(head)) if any(line[i] for line in lines)]
    text = text_table([[line[i] for i in used] for line in [head, *lines]], right={head[i] for i in used} & _RIGHT)
    if any(not table.rows_exact or not table.bytes_exact for table in tables):
        text.append("~: estimated; all other figures are exact")
    return text


_RIGHT = {"rows", "bytes", "width", "key"}


def _details(table: Table) -> list[str]:
    lines = []
    if table.partitions is not None:
        access = "" if not table.access_rows else f", use is kept of {count_text(table.access_rows)} rows"
        lines.append(f"  {table.partitions} partitions{access}")
    if table.recorded_rows:
        lines.append(f"  {count_text(table.recorded_rows)} rows were loaded, from a folder: {table.fingerprint}")
    elif table.fingerprint:
        lines.append(f"  fingerprint: {table.fingerprint}")
    sample = table.sample
    if sample.rows:
        bad = [
            f"{count} with {what}"
            for what, count in (("NaN", sample.rows_with_nan), ("infinity", sample.rows_with_infinity))
            if count
        ]
        lines.append(f"  {count_text(sample.rows)} rows looked at: {', '.join(bad) or 'all values are finite'}")
    more = " ..." if (table.width or 0) > SHOWN_VALUES else ""
    for key, values in zip(sample.keys, sample.values, strict=True):
        lines.append(f"    key {key}: {' '.join(f'{value:.6g}' for value in values)}{more}")
    lines += [f"  note: {note}" for note in table.notes] + [f"  PROBLEM: {problem}" for problem in table.problems]
    return ["", table.name, *lines] if lines else []
