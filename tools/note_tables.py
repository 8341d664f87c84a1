"""Tables of recorded runs in the design notes: each is made from lines of benchmarks/results.

A note holds them between `<!-- table NAME -->` and `<!-- end -->`; tools/generate_docs.py puts them there.
"""

import json
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def last_run(records: list[dict], *kinds: str) -> tuple[dict, list[dict]]:
    """The last run that has lines of these kinds, and these lines."""
    runs: list[tuple[dict, list[dict]]] = []
    for record in records:
        if record["kind"] == "run":
            runs.append((record, []))
        elif record["kind"] in kinds:
            runs[-1][1].append(record)
    return next((run, lines) for run, lines in reversed(runs) if lines)


def table(head: list[str], lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, ["---"] * len(head), *lines])


def _with_range(ratio: float, quartiles: list[float]) -> str:
    return f"**{ratio:.2f}** ({quartiles[0]:.2f} .. {quartiles[1]:.2f})"


def load_beside_lookups(records: list[dict]) -> str:
    """One line a run: the lines that follow a `run` are its own."""
    runs: list[tuple[dict, dict[str, dict]]] = []
    run: dict = {}
    for record in records:
        if record["kind"] == "run":
            run = record
        elif record["kind"] == "load_beside_lookups":
            if not runs or runs[-1][0] is not run:
                runs.append((run, {}))
            runs[-1][1][record["tiers"]] = record
    tiers = list(dict.fromkeys(name for _, measured in runs for name in measured))
    names = {"hash_map": "hash map", "rocks_db": "RocksDB"}
    titles = [" and ".join(names.get(tier, tier) for tier in name.split(" + ")) for name in tiers]
    head = ["version", "commit", "load average", "quiet p99 (us)", *titles]
    lines = []
    for about, measured in runs:
        quiet = [f"{measured[name]['quiet_p99_us']:,.0f}" if name in measured else "" for name in tiers]
        ratios = [
            _with_range(measured[name]["p99_ratio"], measured[name]["p99_ratio_quartiles"]) if name in measured else ""
            for name in tiers
        ]
        load = f"{about['load_average']:.1f}" if "load_average" in about else ""
        start = [about.get("version", ""), about.get("commit", ""), load, " / ".join(quiet)]
        lines.append([*start, *ratios])
    return table(head, lines)


def cache_replacement(records: list[dict]) -> str:
    workloads = {"zipf": "Zipf 1.05", "scan": "with a scan", "shift": "after a shift", "shifted": "later"}
    cells: dict[str, dict[str, str]] = {}
    for record in records:
        if record["kind"] == "replacement" and record["batch"] == 4096:
            text = f"{record['hit_rate']:.3f} ({record['hit_writes']:.3f})"
            cells.setdefault(record["rule"], {})[record["workload"]] = text
    lines = [[rule, *(cells[rule][workload] for workload in workloads)] for rule in cells]
    return table(["hit rate (part of the hits that write a mark)", *workloads.values()], lines)


def uvm_exchange(records: list[dict]) -> str:
    workloads = {"zipf": "Zipf 1.05", "shift": "after a shift", "shifted": "later", "flat": "uniform"}
    cells: dict[int, dict[str, dict]] = {}
    for record in records:
        if record["kind"] == "uvm":
            cells.setdefault(record["device_ways"], {})[record["workload"]] = record
    lines = [
        [f"{ways} of 7", f"{found['zipf']['ideal']:.3f}", f"{found['zipf']['as_placed']:.3f}"]
        + [f"{found[workload]['on_device']:.3f} ({found[workload]['link_rows']:.3f})" for workload in workloads]
        for ways, found in cells.items()
    ]
    head = ["rows on the device", "ideal, Zipf", "as placed"]
    return table([*head, *(f"{text}: met there (rows moved a read)" for text in workloads.values())], lines)


def redis(records: list[dict]) -> str:
    head = ["nodes", "width", "keys in a call", "Fetch / raw pipelines (middle half of the rounds)"]
    lines = [
        [str(record["nodes"]), str(record["width"]), f"{record['batch']:,}"]
        + [_with_range(record["ratio"], record["ratio_quartiles"])]
        for record in records
        if record["kind"] == "redis"
    ]
    return table(head, lines)


def rocksdb(records: list[dict]) -> str:
    cases = {
        "bulk load beside write batches of 10,000 sorted rows past the log": ("rocksdb_load", "bulk_over_batches"),
        "bulk load beside our own upserts": ("rocksdb_load", "bulk_over_upserts"),
        "`Fetch` of 65,536 keys, one thread, beside a loop of `Get`": ("rocksdb_fetch", "fetch_over_get_loop"),
        "the same beside `MultiGet` of 10,000 keys as they come": ("rocksdb_fetch", "fetch_over_multi_get"),
    }
    sizes = sorted({record["row_bytes"] for record in records if record["kind"] != "run"})
    values = {
        (record["kind"], record["row_bytes"], field): value for record in records if record["kind"] != "run"
        for field, value in record.items()
    }  # fmt: skip
    lines = [[what, *(f"{values[kind, size, field]:.1f}" for size in sizes)] for what, (kind, field) in cases.items()]
    return table(["times as fast", *(f"rows of {size} bytes" for size in sizes)], lines)


def device_cache(records: list[dict]) -> str:
    """A line for each width and distribution of the ids, a column for each size of the batch."""
    sizes = sorted({record["keys"] for record in records if record["kind"] == "device_cache_hits"})
    cells: dict[tuple[int, float], list[str]] = {}
    for record in records:
        if record["kind"] == "device_cache_hits":
            text = f"{record['whole_ratio']:.2f} / {record['told_ratio']:.2f} ({record['told_of_telling']:.2f})"
            cells.setdefault((record["width"], record["zipf"]), []).append(text)
    lines = [[str(width), f"Zipf {zipf}" if zipf else "uniform", *texts] for (width, zipf), texts in cells.items()]
    return table(["width", "ids", *(f"{size:,} keys: whole / told" for size in sizes)], lines)


def device_rows(records: list[dict]) -> str:
    """A line for each width and way of lying, a column for each distribution and size of the batch."""
    _, found = last_run(records, "device_cache_rows")
    columns = sorted({(record["zipf"], record["keys"]) for record in found})
    cells: dict[tuple[int, str], dict[tuple[float, int], str]] = {}
    for record in found:
        plain = record["rows"] == "float32"
        text = f"{record['us']:.1f} us" if plain else f"{record['times_float32']:.1f}"
        cells.setdefault((record["width"], record["rows"]), {})[record["zipf"], record["keys"]] = text
    lines = [[str(width), rows, *(texts[at] for at in columns)] for (width, rows), texts in cells.items()]
    titles = [f"{'Zipf' if zipf else 'uniform'}, {keys:,} keys" for zipf, keys in columns]
    return table(["width", "rows", *titles], lines)


def _tensorflow(records: list[dict], kind: str, base: str) -> str:
    _, found = last_run(records, kind)
    sizes = sorted({record["batch"] for record in found})
    cells: dict[str, list[str]] = {}
    for record in found:
        cells.setdefault(record["peer"], []).append(f"{record['done_us']:,.0f} us ({record['times_as_fast']:.2f})")
    lines = [[peer, *texts] for peer, texts in cells.items()]
    return table([f"time (times as fast as {base})", *(f"{size:,}" for size in sizes)], lines)


def tensorflow_ops(records: list[dict]) -> str:
    return _tensorflow(records, "gpu_op", "tf.nn.embedding_lookup")


def tensorflow_model(records: list[dict]) -> str:
    return _tensorflow(records, "gpu_model", "native")


def device_beside_writer(records: list[dict]) -> str:
    head = ["width", "quiet median / p99 (us)", "beside updates", "p99 ratio", "updates, of the rate of copies"]
    lines = [
        [str(record["width"]), f"{record['quiet_us']:.0f} / {record['quiet_p99_us']:.0f}"]
        + [f"{record['beside_us']:.0f} / {record['beside_p99_us']:.0f}"]
        + [f"**{record['p99_ratio']:.2f}**", f"{record['updates_of_copy_rate']:.3f}"]
        for record in records
        if record["kind"] == "device_cache_beside_writer"
    ]
    return table(head, lines)


def device_pooled(records: list[dict]) -> str:
    sizes = sorted({record["output_rows"] for record in records if record["kind"] == "device_cache_pooled"})
    cells: dict[tuple[int, float], list[str]] = {}
    for record in records:
        if record["kind"] == "device_cache_pooled":
            text = f"{record['told_ratio']:.2f} ({record['told_us']:.1f} us)"
            cells.setdefault((record["width"], record["zipf"]), []).append(text)
    lines = [[str(width), f"Zipf {zipf}" if zipf else "uniform", *texts] for (width, zipf), texts in cells.items()]
    return table(["width", "ids", *(f"{size:,} output rows" for size in sizes)], lines)


def device_lookup(records: list[dict]) -> str:
    lines = []
    for record in last_run(records, "device_lookup_hits", "device_lookup_misses")[1]:
        hits = record["kind"] == "device_lookup_hits"
        what = f"{record['cache']} cache, all hit" if hits else f"dynamic cache, {record['missing_keys']:,.0f} missing"
        call = f"{record['call_us']:.1f} / {record['call_p99_us']:.1f}" if hits else ""
        rows = f"{record['rows_us']:.1f} / {record['rows_p99_us']:.1f}"
        alone = ["", ""] if hits else [f"{record['fetch_us']:.1f}", f"{record['copy_us']:.1f}"]
        lines.append([str(record["width"]), f"{record['keys']:,}", what, call, rows, *alone])
    return table(["width", "keys", "what", "call: median / p99", "rows: median / p99", "fetch", "copy"], lines)


# By the name in the marker: the lines, and what makes a table of them.
TABLES: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "load_beside_lookups": ("stack.jsonl", load_beside_lookups),
    "cache_replacement": ("cache_replacement.jsonl", cache_replacement),
    "uvm_exchange": ("uvm_exchange.jsonl", uvm_exchange),
    "device_cache": ("device_cache.jsonl", device_cache),
    "device_beside_writer": ("device_cache.jsonl", device_beside_writer),
    "device_pooled": ("device_cache.jsonl", device_pooled),
    "device_rows": ("device_cache.jsonl", device_rows),
    "device_lookup": ("device_lookup.jsonl", device_lookup),
    "tensorflow_ops": ("tensorflow_gpu.jsonl", tensorflow_ops),
    "tensorflow_model": ("tensorflow_gpu.jsonl", tensorflow_model),
    "redis": ("redis.jsonl", redis),
    "rocksdb": ("rocksdb.jsonl", rocksdb),
}


def make(name: str) -> str:
    lines, make_table = TABLES[name]
    return make_table(read(lines))
