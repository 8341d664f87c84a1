"""A memory plan: what each table takes in each tier, the sums against what there is, and a proposal."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..units import bytes_text, count_text, text_table

TIER_TITLES = {
    "hash_map": "hash map",
    "multi_process_hash_map": "shared map",
    "redis_cluster": "Redis",
    "rocks_db": "RocksDB",
}


@dataclasses.dataclass
class TablePlan:
    """One table. Bytes are those after the load."""

    model: str
    table: str
    folder: str
    rows: int
    width: int
    key_bytes: int
    keys_per_sample: int
    keys: str  # "0..n-1", "scattered", "mixed"
    keys_sampled: bool
    volatile_rows: int = 0
    volatile_bytes: int = 0
    persistent_bytes: int = 0
    gpu_rows: int = 0
    gpu_bytes: int = 0  # on each device of the model
    shared_as: str = ""  # share_tables: the name of the folder's rows in stores; tables with the same one are one
    counted_with: str = ""  # of those all but the first: its name; what they take is counted there
    proposal: str = ""  # "GPU", "CPU", "Redis", "disk", "nowhere"
    reason: str = ""

    @property
    def row_bytes(self) -> int:
        return self.width * 4

    @property
    def name(self) -> str:
        return f"{self.model}/{self.table}"


@dataclasses.dataclass
class Resource:
    """One kind of memory or disk. `items`: what takes it after the load; `temporary`: what comes to it for a while."""

    title: str
    items: dict[str, int] = dataclasses.field(default_factory=dict)
    temporary: dict[str, int] = dataclasses.field(default_factory=dict)
    available: int | None = None
    estimate: bool = False  # rests on a bound, not on a formula that was measured

    @property
    def need(self) -> int:
        return sum(self.items.values())

    @property
    def peak(self) -> int:
        """With all that comes and goes, at once: loading a new version does."""
        return self.need + sum(self.temporary.values())

    @property
    def fits(self) -> bool:
        return self.available is None or self.need <= self.available

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "need": self.need, "peak": self.peak, "fits": self.fits}


@dataclasses.dataclass
class MemoryPlan:
    config: str
    volatile: str  # types, as ps.json has them
    persistent: str
    tables: list[TablePlan]
    host: Resource
    redis: Resource | None = None
    shared: Resource | None = None
    disk: Resource | None = None
    gpus: dict[int, Resource] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)  # for which a server would refuse the load
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def resources(self) -> list[Resource]:
        return [part for part in (self.host, self.redis, self.shared, self.disk, *self.gpus.values()) if part]

    @property
    def fits(self) -> bool:
        """Whether all that is needed after the load is there, as far as that is known, and a server would load it."""
        return not self.problems and all(resource.fits for resource in self.resources)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; all amounts are bytes."""
        document = dataclasses.asdict(self)
        for name in ("host", "redis", "shared", "disk"):
            part = getattr(self, name)
            document[name] = part and part.to_dict()
        document["gpus"] = {str(number): part.to_dict() for number, part in self.gpus.items()}
        return {**document, "fits": self.fits}

    def to_text(self) -> str:
        lines = [f"memory plan of {self.config}", "", *self._tables()]
        for resource in self.resources:
            lines += ["", *_resource(resource)]
        lines += ["", "where each table should live"]
        lines += text_table([["table", "place", "reason"], *([t.name, t.proposal, t.reason] for t in self.tables)])
        if self.problems:
            lines += ["", *(f"PROBLEM: {problem}" for problem in self.problems)]
        if self.notes:
            lines += ["", "notes", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)

    def _tables(self) -> list[str]:
        columns = ["model", "table", "rows", "width", "keys"]
        volatile, persistent = TIER_TITLES.get(self.volatile), TIER_TITLES.get(self.persistent)
        amounts = [(volatile, "volatile_bytes"), (persistent, "persistent_bytes")]
        if self.gpus:
            amounts.append(("each GPU", "gpu_bytes"))
        amounts = [(title, name) for title, name in amounts if title]
        lines = [columns + [title for title, _ in amounts]]
        for table in self.tables:
            if table.counted_with:
                lines.append([table.model, table.table, f"shared: {table.counted_with}", *[""] * (2 + len(amounts))])
                continue
            keys = table.keys + (" (sampled)" if table.keys_sampled else "")
            line = [table.model, table.table, count_text(table.rows), str(table.width), keys]
            lines.append(line + [bytes_text(getattr(table, name)) for _, name in amounts])
        sums = [bytes_text(sum(getattr(table, name) for table in self.tables)) for _, name in amounts]
        rows = sum(table.rows for table in self.tables if not table.counted_with)
        lines.append(["all", "", count_text(rows), "", "", *sums])
        return text_table(lines, right={"rows", "width", *(title for title, _ in amounts)})


def _resource(resource: Resource) -> list[str]:
    about = "~" if resource.estimate else ""
    lines = [[f"  {name}", about + bytes_text(count)] for name, count in resource.items.items()]
    lines += [[f"  for a while: {name}", f"+ {bytes_text(count)}"] for name, count in resource.temporary.items()]
    verdict = f"{about}{bytes_text(resource.need)} needed"
    if resource.peak > resource.need:
        verdict += f", {bytes_text(resource.peak)} at the highest"
    if resource.available is not None:
        verdict += f", {bytes_text(resource.available)} available: "
        if not resource.fits:
            verdict += "DOES NOT FIT"
        elif resource.peak > resource.available:
            verdict += "fits, but not while what comes for a while is there"
        else:
            verdict += "fits"
    return [f"{resource.title}: {verdict}", *text_table([["", "bytes"], *lines], right={"bytes"})[1:]]
