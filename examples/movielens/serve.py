"""Loads an exported model in a process of its own, predicts, and measures: `python serve.py MODEL INPUTS OUTPUTS`.

MODEL is a SavedModel folder, of the ranker with its native embeddings or of the one that HPS serves; the code is the
same for both. INPUTS is an .npz file of model inputs. OUTPUTS is a .npz file to write: the probabilities and, as JSON,
what was measured.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from movielens import console
from movielens.data import MULTI_HOT

BATCH_SIZES = (1, 256, 4096)
LOOKUP_IDS = 65_536
LOOKUP_TABLE = "item_x_hour"


def main(model_folder: str, input_file: str, output_file: str) -> None:
    """Runs the process."""
    tf = console.quiet_tensorflow()
    import hierarchical_parameter_server as hps

    served_by_hps = (pathlib.Path(model_folder) / "assets" / "ps.json").exists()
    memory_before = resident_bytes()
    start = time.perf_counter()
    model = tf.saved_model.load(model_folder)
    with np.load(input_file) as file:
        inputs = dict(file)
    probabilities = model.serve(batch(tf, inputs, len(inputs["user"]), served_by_hps))["probability"].numpy()
    measured: dict = {"ready_seconds": time.perf_counter() - start}
    if served_by_hps:
        (server,) = hps.stats()["servers"]
        measured["rows_served"] = rows_served(server)
    measured["latency_ms"] = {}
    for size in BATCH_SIZES:
        tensors = batch(tf, inputs, size, served_by_hps)
        measured["latency_ms"][str(size)] = milliseconds(lambda tensors=tensors: model.serve(tensors))
    lookup = hps_lookup(model_folder, hps) if served_by_hps else native_lookup(tf, model)
    ids = tf.constant(np.resize(inputs[LOOKUP_TABLE], LOOKUP_IDS))
    measured["lookups_per_second"] = LOOKUP_IDS / milliseconds(lambda: lookup(ids)) * 1e3
    measured["memory_bytes"] = resident_bytes() - memory_before
    np.savez(output_file, probabilities=probabilities, measured=json.dumps(measured))


def batch(tf, inputs: dict[str, np.ndarray], size: int, sparse: bool) -> dict:
    """The first `size` samples as tensors; multi-hot inputs as SparseTensors if the model takes them so."""
    tensors = {name: tf.constant(values[:size]) for name, values in inputs.items()}
    return {name: tf.sparse.from_dense(t) if sparse and name in MULTI_HOT else t for name, t in tensors.items()}


def rows_served(server: dict) -> dict[str, int]:
    """Rows that came from each tier, over all tables."""
    total: dict[str, int] = {}
    for model in server["models"]:
        for table in model["tables"]:
            for tier, rows in table["rows_served"].items():
                total[tier] = total.get(tier, 0) + rows
    return total


def hps_lookup(model_folder: str, hps) -> Callable:
    """Looks ids up in one table through a layer on the server that the model has opened."""
    config = pathlib.Path(model_folder) / "assets" / "ps.json"
    served = json.loads(config.read_text())["models"][0]
    table = next(i for i, name in enumerate(served["embedding_table_names"]) if name.startswith(LOOKUP_TABLE))
    return hps.LookupLayer(
        served["model"], table, served["embedding_vecsize_per_table"][table], ps_config_file=str(config)
    )


def native_lookup(tf, model) -> Callable:
    """The same with TensorFlow's own op."""
    table = next(v for v in model.model_variables if f"{LOOKUP_TABLE}_embedding" in v.name)
    return lambda ids: tf.nn.embedding_lookup(table, ids)


def milliseconds(call: Callable) -> float:
    """Median time of a call, over about half a second."""
    call()
    times: list[float] = []
    end = time.perf_counter() + 0.5
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def resident_bytes() -> int:
    """Memory of this process that no file backs (RssAnon)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main(*sys.argv[1:])
