"""`python -m benchmarks`: measures, and writes JSON lines, a table and a chart."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from . import report
from .axes import CALLS, FORMS, FULL, QUICK

ROOT = Path(__file__).resolve().parent.parent


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev bench", description="Compares lookups with TensorFlow's own.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the harness works, no more")
    parser.add_argument("--rows", type=positive, help=f"rows of each table (default {FULL.rows:,})")
    parser.add_argument("--width", type=positive, nargs="+", help=f"widths of the rows (default {FULL.widths})")
    parser.add_argument("--batch", type=positive, nargs="+", help=f"samples in a call (default {FULL.batches})")
    parser.add_argument("--form", nargs="+", choices=FORMS, help="default: both")
    parser.add_argument("--call", nargs="+", choices=CALLS, help="default: both")
    parser.add_argument("--distribution", nargs="+", choices=FULL.distributions, help="default: both")
    parser.add_argument("--seconds", type=float, help=f"for each case (default {FULL.seconds_per_case})")
    parser.add_argument("--skip", choices=("lookup", "load"), help="leave out one of the two benchmarks")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output", type=Path, help="folder for the results (default build/benchmarks)")
    place.add_argument("--record", action="store_true", help="into benchmarks/results, and write docs/performance.md")
    return parser.parse_args(arguments)


def chosen_axes(options: argparse.Namespace):
    axes = QUICK if options.quick else FULL
    chosen = {
        "rows": options.rows,
        "widths": options.width and tuple(options.width),
        "batches": options.batch and tuple(options.batch),
        "forms": options.form and tuple(options.form),
        "calls": options.call and tuple(options.call),
        "distributions": options.distribution and tuple(options.distribution),
        "seconds_per_case": options.seconds,
    }
    return replace(axes, **{name: value for name, value in chosen.items() if value is not None})


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(axes, write, skip: str | None) -> None:
    """Measures everything; write(record) is called as each record is there."""
    from .load import measure_load
    from .measure import measure
    from .peers import PEERS
    from .workload import TableData, cases

    if skip != "load":
        say(f"loading a folder of {axes.load_folder_bytes / 2**30:.2f} GiB, {axes.load_repeats} times")
        record = measure_load(axes)
        say(f"  {report.load_line(record)}")
        write(record)
    if skip == "lookup":
        return
    total = sum(len(list(cases(axes, width))) for width in axes.widths)
    done = 0
    for width in axes.widths:
        with tempfile.TemporaryDirectory(prefix="hps_bench_") as folder:
            say(f"preparing tables of {axes.rows:,} rows of width {width}")
            data = TableData(axes.rows, width, Path(folder))
            peers = [peer() for peer in PEERS]
            try:
                for peer in peers:
                    peer.prepare(data)
                for case in cases(axes, width):
                    record = measure(case, axes, data, peers)
                    done += 1
                    say(f"[{done}/{total}] {report.lookup_line(record)}")
                    write(record)
            finally:
                for peer in peers:
                    peer.close()


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    axes = chosen_axes(options)
    output = report.RESULTS if options.record else options.output or ROOT / "build" / "benchmarks"
    output.mkdir(parents=True, exist_ok=True)
    # Paths stay out of results.
    shown = [word for word in arguments if not options.output or word not in ("--output", str(options.output))]

    from .machine import describe

    # Written beside the old results first: a run that fails leaves them as they are.
    draft = output / "results.jsonl.draft"
    with open(draft, "w", encoding="utf-8") as lines:

        def write(record: dict) -> None:
            lines.write(json.dumps(record) + "\n")
            lines.flush()

        write(describe(shlex.join(["./dev", "bench", *shown])))
        run(axes, write, options.skip)
    draft.rename(output / report.LINES)
    report.write_reports(output)
    if options.record:
        report.write_page()
        report.write_generated_pages()
    print((output / report.SUMMARY).read_text(encoding="utf-8"))
    say(f"written: {report.LINES}, {report.SUMMARY}, {report.CHART} in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
