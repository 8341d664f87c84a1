"""Every kind of tier side by side: latency of lookups and bytes a row.

    python -m benchmarks.tiers [--record] [--rows N] [--width N] [--seconds S]

Each tier serves the same table alone, from a server of its own in this process; Redis runs beside it on this machine.
The tiers take turns call by call on the same ids. Rows are checked before and after. --record writes
benchmarks/results/tiers.jsonl and tiers.md, and copies the table into docs/operations.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .axes import FULL, Axes
from .measure import WrongRowsError, take_turns
from .report import RESULTS, write_generated_pages
from .workload import MODEL, TableData, scatter

BATCHES = (1, 1_024, 65_536)
LINES, SUMMARY = "tiers.jsonl", "tiers.md"
TESTS = Path(__file__).resolve().parent.parent / "tests"


@dataclass
class Tier:
    """An open server whose rows all lie in one tier."""

    name: str
    title: str
    server: object
    measured_bytes: Callable[[], int]  # that its rows take, where they lie


def _volatile_bytes(server) -> int:
    return server.stats()["models"][0]["tables"][0]["volatile"]["memory_bytes"]


@contextlib.contextmanager
def _in_process(kind: str, title: str, config: dict, folder: Path) -> Iterator[Tier]:
    import hierarchical_parameter_server as hps

    volatile = {"type": kind}
    if kind == "multi_process_hash_map":
        volatile |= {"shared_memory_name": f"hps_bench_{os.getpid()}", "shared_memory_size": 4 << 30}
    with hps.ParameterServer({**config, "volatile_db": volatile}) as server:
        yield Tier(kind, title, server, lambda: _volatile_bytes(server))


@contextlib.contextmanager
def _rocksdb(kind: str, title: str, config: dict, folder: Path) -> Iterator[Tier]:
    import hierarchical_parameter_server as hps

    database = folder / "rocksdb"
    config = {
        **config,
        "volatile_db": {"type": "disabled"},
        "persistent_db": {"type": "rocks_db", "path": str(database)},
    }
    with hps.ParameterServer(config) as server:
        yield Tier(kind, title, server, lambda: sum(file.stat().st_size for file in database.glob("*.sst")))


@contextlib.contextmanager
def _redis(kind: str, title: str, config: dict, folder: Path) -> Iterator[Tier]:
    import hierarchical_parameter_server as hps

    sys.path.insert(0, str(TESTS))
    from services import RedisCluster, RedisServer

    service = RedisCluster(masters=3) if kind == "redis_cluster" else RedisServer()
    with service, contextlib.ExitStack() as clients:
        masters = [clients.enter_context(node.client()) for node in service.nodes]

        def used() -> int:
            return sum(client.info("memory")["used_memory_dataset"] for client in masters)

        before = used()
        volatile = {"type": "redis_cluster", "address": service.address, "timeout_ms": 0}
        with hps.ParameterServer({**config, "volatile_db": volatile}) as server:
            yield Tier(kind, title, server, lambda: used() - before)


TIERS = (
    ("hash_map", "hash map", _in_process),
    ("multi_process_hash_map", "hash map in shared memory", _in_process),
    ("redis_single", "Redis, one server, same machine", _redis),
    ("redis_cluster", "Redis Cluster, 3 masters, same machine", _redis),
    ("rocks_db", "RocksDB, files in the page cache", _rocksdb),
)


def _check(tiers: list[Tier], keys: np.ndarray, expected: np.ndarray) -> None:
    for tier in tiers:
        rows, found = tier.server.lookup(keys, MODEL, return_found=True)
        if not found.all() or not np.array_equal(rows, expected):
            raise WrongRowsError(f"{tier.name} returned wrong rows")


def run(axes: Axes, write: Callable[[dict], None]) -> None:
    (width,) = axes.widths
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory(prefix="hps_tiers_") as name, contextlib.ExitStack() as stack:
        data = TableData(axes.rows, width, Path(name))
        config = json.loads(data.scattered_config_path.read_text(encoding="utf-8"))
        tiers = [stack.enter_context(open_tier(kind, title, config, Path(name))) for kind, title, open_tier in TIERS]
        for batch in axes.batches:
            ids = [random.integers(0, axes.rows, batch) for _ in range(max(2, min(64, (1 << 20) // batch)))]
            keys = [scatter(some) for some in ids]
            _check(tiers, keys[0], data.values[ids[0]])
            calls = [(lambda some, tier=tier: tier.server.lookup(some, MODEL), keys) for tier in tiers]
            times, _ = take_turns(calls, axes)
            _check(tiers, keys[-1], data.values[ids[-1]])
            for tier, taken in zip(tiers, times, strict=True):
                write(
                    {
                        "kind": "tier",
                        "tier": tier.name,
                        "title": tier.title,
                        "rows": axes.rows,
                        "width": width,
                        "ids": batch,
                        "rounds": len(taken),
                        "median_us": round(float(np.median(taken)) * 1e6, 2),
                        "p99_us": round(float(np.quantile(taken, 0.99)) * 1e6, 2),
                        "rows_per_second": round(batch / float(np.median(taken))),
                        # Call by call against the first tier.
                        "times_as_long": round(float(np.median(taken / times[0])), 2),
                        "bytes_per_row": round(tier.measured_bytes() / axes.rows, 1),
                        "load_average": os.getloadavg()[0],
                    }
                )


def summary(records: list[dict]) -> str:
    """The table for docs/operations.md, out of the lines of a run."""
    about, *measured = records
    batches = sorted({record["ids"] for record in measured})
    counts = [f"{ids:,} {'id' if ids == 1 else 'ids'}" for ids in batches]
    head = ["tier", *(f"{count}: median / p99 (us)" for count in counts), "times as long", "million rows/s"]
    lines = [[*head, "bytes a row"], ["---"] * (len(head) + 1)]
    for tier in dict.fromkeys(record["tier"] for record in measured):
        of_tier = {record["ids"]: record for record in measured if record["tier"] == tier}
        cells = [f"{of_tier[ids]['median_us']:,.0f} / {of_tier[ids]['p99_us']:,.0f}" for ids in batches]
        middle = of_tier[batches[len(batches) // 2]]
        lines.append(
            [
                middle["title"],
                *cells,
                f"**{middle['times_as_long']:.1f}**",
                f"{of_tier[batches[-1]]['rows_per_second'] / 1e6:.2f}",
                f"{middle['bytes_per_row']:.0f}",
            ]
        )
    machine, first = about["machine"], measured[0]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text += (
        f"\n\nRows of {first['width']} float32 values ({first['width'] * 4} bytes), {first['rows']:,} rows, keys from "
        f"all over the range of int64, uniform; one call of `ParameterServer.lookup`. *Times as long* is call by call "
        f"against the first line, at {batches[len(batches) // 2]:,} ids; rows/s at {batches[-1]:,}. {machine['cpu']}, "
        f"{machine['cores']} cores; commit {about['commit']}, {about['date']}, load average "
        f"{max(record['load_average'] for record in measured):.1f}.\n"
    )
    return text


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiers", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each number of ids")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results")
    parser.add_argument("--output", type=Path, help="folder for the results instead")
    options = parser.parse_args(arguments)
    axes = replace(
        FULL,
        rows=options.rows,
        widths=(options.width,),
        batches=tuple(batch for batch in BATCHES if batch <= max(1_024, options.rows)),
        seconds_per_case=options.seconds,
        min_rounds=5,
    )
    from .machine import describe

    shown = [word for word in arguments if not options.output or word not in ("--output", str(options.output))]
    records = [describe(shlex.join(["python", "-m", "benchmarks.tiers", *shown]))]
    run(axes, records.append)
    output = RESULTS if options.record else options.output
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / LINES).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        (output / SUMMARY).write_text(summary(records), encoding="utf-8")
    if options.record:
        write_generated_pages()
    print(summary(records))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
