"""What a conversion found, wrote and left alone."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class TableReport:
    """One table that was written.

    Attributes:
        name: table name, as in ps.json.
        source: the layer or variable it came from.
        rows: number of rows; the keys are 0 .. rows - 1.
        width: floats per row.
        source_dtype: type of the values in the source; the table itself is float32.
        nan_rows: rows that hold at least one NaN. They are written as they are.
        folder: where `key` and `emb_vector` lie.
    """

    name: str
    source: str
    rows: int
    width: int
    source_dtype: str
    nan_rows: int
    folder: str

    @property
    def size_bytes(self) -> int:
        """Bytes on disk: an int64 key and `width` float32 values per row."""
        return self.rows * (8 + 4 * self.width)


@dataclasses.dataclass(frozen=True)
class NotTaken:
    """A variable or layer that was seen but not converted, and why."""

    source: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclasses.dataclass
class ConversionReport:
    """Result of `hps.convert`.

    Attributes:
        source: what was converted (a path, or the name of the model).
        output_dir: absolute path of the folder that was written.
        model_name: name of the model in ps.json.
        ps_config_file: absolute path of ps.json.
        tables: the tables, in the order of ps.json: `table_id` is the position in this list.
        not_taken: what was seen and left alone.
        dense_model: the model with its embeddings replaced by HPS layers, or None (see `dense_note`).
        dense_model_file: the same model, saved; None if there is none.
        dense_note: why there is no dense model; empty if there is one.
        seconds: time spent writing the tables.
    """

    source: str
    output_dir: str
    model_name: str
    ps_config_file: str
    tables: list[TableReport]
    not_taken: list[NotTaken]
    dense_model: Any = None
    dense_model_file: str | None = None
    dense_note: str = ""
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Rows of all tables."""
        return sum(table.rows for table in self.tables)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tables on disk."""
        return sum(table.size_bytes for table in self.tables)

    def to_json(self) -> str:
        """The report without the live model, as JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "dense_model"}
        fields["tables"] = [dataclasses.asdict(table) for table in self.tables]
        fields["not_taken"] = [dataclasses.asdict(entry) for entry in self.not_taken]
        return json.dumps(fields, indent=2) + "\n"

    def summary(self) -> str:
        """A few aligned lines for people."""
        name_width = max([len(table.name) for table in self.tables] + [5])
        lines = [f"{'table':<{name_width}}  {'rows':>13}  {'width':>5}  {'MB':>9}  from"]
        for table in self.tables:
            nan = f"  ({table.nan_rows:,} rows with NaN)" if table.nan_rows else ""
            lines.append(
                f"{table.name:<{name_width}}  {table.rows:>13,}  {table.width:>5}  {table.size_bytes / 1e6:>9,.1f}  "
                f"{table.source} ({table.source_dtype}){nan}"
            )
        speed = f", {self.size_bytes / 1e6 / self.seconds:,.0f} MB/s" if self.seconds > 0 else ""
        lines.append(f"{self.rows:,} rows, {self.size_bytes / 1e6:,.1f} MB in {self.seconds:.1f} s{speed}")
        lines.append(f"config:      {self.ps_config_file}")
        lines.append(f"dense model: {self.dense_model_file or 'none: ' + self.dense_note}")
        matrices = [entry for entry in self.not_taken if len(entry.shape) == 2]
        lines.extend(f"not taken:   {e.source} {list(e.shape)} {e.dtype}: {e.reason}" for e in matrices)
        if len(self.not_taken) > len(matrices):
            lines.append(f"not taken:   {len(self.not_taken) - len(matrices)} variables that are no matrices")
        return "\n".join(lines)
