"""Tables and pages from the JSON lines of a run; no number comes from anywhere else.

`python -m benchmarks.report` writes the recorded run's table, chart and pages anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .chart import ratio_chart

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
LINES, SUMMARY, CHART = "results.jsonl", "summary.md", "ratio.svg"

PEERS = ("hps", "tensorflow", "session")
SUMMARY_WIDTH = 64
QUIET_LOAD_AVERAGE = 1.5  # above it, other programs were at work beside the benchmark's own threads


@dataclass
class Run:
    """The records of one file, by kind."""

    about: dict
    lookups: list[dict]
    load: dict | None


def read(path: Path) -> Run:
    """Raises ValueError where the file is not one run."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not records or records[0].get("kind") != "run":
        raise ValueError(f"{path} does not begin with the record of a run")
    loads = [record for record in records if record["kind"] == "load"]
    return Run(records[0], [record for record in records if record["kind"] == "lookup"], loads[0] if loads else None)


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:,.0f}"


def _median_and_p99(measured: dict) -> str:
    return f"{_time(measured['median_us'])} / {_time(measured['p99_us'])}"


def _ratio(measured: dict) -> str:
    low, high = measured["ratio_quartiles"]
    return f"**{measured['ratio']:.2f}** ({low:.2f} .. {high:.2f})"


def _tiers(record: dict) -> str:
    rows_from = record["peers"]["hps"]["rows_from"]
    total = sum(rows_from.values())
    return ", ".join(f"{tier} {rows / total:.0%}" for tier, rows in rows_from.items() if rows)


def lookup_line(record: dict) -> str:
    """One line for people who wait."""
    name = f"{record['form']} {record['distribution']} width {record['width']} batch {record['batch']} {record['call']}"
    times = ", ".join(f"{peer} {_time(measured['median_us'])} us" for peer, measured in record["peers"].items())
    return f"{name}: {_ratio(record['peers']['hps']).replace('*', '')} times as fast; {times}"


def load_line(record: dict) -> str:
    return (
        f"{record['rows']:,} rows of width {record['width']} ({record['folder_bytes'] / 2**30:.2f} GiB) into the hash "
        f"map in {record['seconds']:.2f} s: {record['rows_per_second'] / 1e6:.1f} million rows/s; peak of anonymous "
        f"memory {record['memory_ratio']:.2f} x rows x (row + 16 B / 0.8)"
    )


def _table(head: list[str], lines: list[list]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows) + "\n"


def _about(run: Run) -> str:
    machine, versions = run.about["machine"], run.about["versions"]
    loads = [record["load_average"] for record in [run.about, *run.lookups] + ([run.load] if run.load else [])]
    quiet = run.about["load_average"] <= QUIET_LOAD_AVERAGE
    noise = "quiet" if quiet else "noisy: other programs were running"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, level 3 cache "
        f"{machine['level_3_cache']}; TensorFlow {versions['tensorflow']}, Python {versions['python']}; commit "
        f"{run.about['commit']}, {run.about['date']}. Load average {run.about['load_average']:.1f} before the run "
        f"({noise}), at most {max(loads):.1f} during it. Command: `{run.about['command']}`.\n"
    )


def summary(run: Run) -> str:
    """The short table: one width, through tf.function."""
    widths = sorted({record["width"] for record in run.lookups})
    width = SUMMARY_WIDTH if SUMMARY_WIDTH in widths else (widths or [None])[0]
    text = ""
    chosen = [record for record in run.lookups if record["width"] == width and record["call"] == "function"]
    if chosen:
        lines = []
        for record in chosen:
            own, native = record["peers"]["hps"], record["peers"]["tensorflow"]
            lines.append(
                [
                    f"{record['form']}, {record['distribution']}",
                    f"{record['batch']:,}",
                    f"{record['keys']:,}",
                    _median_and_p99(own),
                    _median_and_p99(native),
                    _ratio(own),
                    f"{record['peers']['hps_scattered']['ratio']:.2f}",
                ]
            )
        head = ["lookup", "batch", "ids", "HPS: median / p99 (us)", "TensorFlow: median / p99 (us)", "times as fast"]
        head += ["scattered keys"]
        text += (
            f"Rows of {width} float32 values, {chosen[0]['rows']:,} rows in the table, one call through `tf.function`; "
            f"HPS answers from its {_tiers(chosen[0]).split()[0]} tier, TensorFlow from a variable. The range beside a "
            "ratio holds the middle half of the rounds; the last column is the ratio for keys from all over the range "
            "of int64, which TensorFlow cannot look up.\n\n"
        )
        text += _table(head, lines) + "\n"
    if run.load:
        text += f"Loading: {load_line(run.load)}.\n\n"
    return text + _about(run)


def page(run: Run) -> str:
    """docs/performance.md."""
    text = (
        "# Performance\n\n"
        "Generated by `python -m benchmarks.report` from `benchmarks/results/results.jsonl`; "
        "[benchmarks/README.md](../benchmarks/README.md) says how the numbers are taken.\n\n"
        "## Lookups beside TensorFlow's own\n\n"
        f"![times as fast as TensorFlow](../benchmarks/results/{CHART})\n\n" + summary(run) + "\n## All cases\n\n"
        "Times are median / 99th percentile; `session` is `hps.ParameterServer` without TensorFlow, for information. "
        "The processor time is that of all threads, which other programs on the machine disturb less. The range beside "
        "each ratio holds the middle half of the rounds. All rows were checked before and after the times were taken.\n"
    )
    for form in dict.fromkeys(record["form"] for record in run.lookups):
        lines = []
        for record in (record for record in run.lookups if record["form"] == form):
            peers = record["peers"]
            lines.append(
                [
                    record["distribution"],
                    record["width"],
                    f"{record['batch']:,}",
                    record["call"],
                    *(_median_and_p99(peers[name]) if name in peers else "" for name in PEERS),
                    f"{_time(peers['hps']['processor_us'])} / {_time(peers['tensorflow']['processor_us'])}",
                    f"{peers['hps']['keys_per_second'] / 1e6:.2f}",
                    _ratio(peers["hps"]),
                    f"{peers['hps_scattered']['ratio']:.2f}",
                    f"{record['unique_share']:.0%}",
                    _tiers(record),
                ]
            )
        head = ["ids", "width", "batch", "call", "HPS (us)", "TensorFlow (us)", "session (us)"]
        head += ["processor time: HPS / TensorFlow (us)", "HPS: million ids/s", "times as fast", "scattered keys"]
        text += f"\n### {form.capitalize()}\n\n" + _table([*head, "unique ids", "rows from"], lines)
    if run.load:
        record = run.load
        text += "\n## Loading\n\n" + _table(
            ["", "measured", "goal"],
            [
                ["rows/s", f"{record['rows_per_second']:,}", f"at least {record['goal_rows_per_second']:,.0f}"],
                ["seconds", record["seconds"], ""],
                ["processor seconds, all threads", record["processor_seconds"], ""],
                ["peak of anonymous memory", f"{record['peak_bytes']:,} B", ""],
                ["beside rows x (row + 16 B / 0.8)", record["memory_ratio"], f"at most {record['goal_memory_ratio']}"],
            ],
        )
        text += (
            f"\n{record['folder_bytes']:,} bytes from the page cache, {record['rows']:,} rows of width "
            f"{record['width']}; the median of {record['repeats']} processes, the highest of their peaks.\n"
        )
    return text


def write_reports(folder: Path) -> None:
    """Writes summary and chart beside the lines."""
    run = read(folder / LINES)
    (folder / SUMMARY).write_text(summary(run), encoding="utf-8")
    (folder / CHART).write_text(ratio_chart(run.lookups), encoding="utf-8")


def write_page() -> None:
    PAGE.write_text(page(read(RESULTS / LINES)), encoding="utf-8")


def write_generated_pages() -> None:
    """Copies what was recorded into the pages that show it, so that none is stale after a recording."""
    subprocess.run([sys.executable, str(ROOT / "tools" / "generate_docs.py")], check=True)


if __name__ == "__main__":
    write_reports(RESULTS)
    write_page()
    write_generated_pages()
