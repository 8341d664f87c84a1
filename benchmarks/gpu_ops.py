"""Lookups of TensorFlow ops on a GPU, beside TensorFlow's own: single ops, and a recommender of 26 tables.

    python -m benchmarks.gpu_ops [--commit HASH] [--empty-op LIBRARY] [--seconds S]

Prints JSON lines. The peers take turns call by call on the same ids; a peer's rows are checked first. The empty op
(native/empty_kernel_op.cu) launches one kernel that does nothing and waits for its word in mapped memory: what any
op costs that has to know something of the GPU before it returns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

import hierarchical_parameter_server as hps
from hierarchical_parameter_server.lookup_ops import TableRef, lookup, lookup_stacked
from hierarchical_parameter_server.resource import server_resource

from .machine import describe

ROWS = 100_000
TABLES = 26
SINGLE_ROWS = 2_000_000  # of the table that single ops look up in
WIDTH = 128
FEATURES = 13
BATCHES = (1_024, 16_384, 65_536, 131_072)


def write_models(folder: Path) -> tuple[str, np.ndarray]:
    """ps.json's path, and the rows of the single table, whose first ones are those of t0.

    Models "dynamic" and "static" have tables t0 .. t25, "one_dynamic" and "one_static" the single one.
    """
    rows = np.random.default_rng(1).random((SINGLE_ROWS, WIDTH), dtype="f4") - 0.5

    def table(name: str, values: np.ndarray) -> str:
        (folder / name).mkdir()
        np.arange(len(values), dtype="<i8").tofile(folder / name / "key")
        values.astype("<f4").tofile(folder / name / "emb_vector")
        return str(folder / name)

    many = {f"t{i}": table(f"t{i}", np.roll(rows[:ROWS], i, axis=0)) for i in range(TABLES)}
    single = {"t": table("t", rows)}

    def model(name: str, tables: dict[str, str], **settings) -> dict:
        return {
            "model": name,
            "sparse_files": list(tables.values()),
            "embedding_vecsize_per_table": [WIDTH] * len(tables),
            "maxnum_catfeature_query_per_table_per_sample": [1] * len(tables),
            "embedding_table_names": list(tables),
            "max_batch_size": BATCHES[-1],
            "gpucache": True,
            "gpucacheper": 1.0,
            **settings,
        }

    dynamic, static = {"init_ec": True}, {"embedding_cache_type": "static"}
    models = [model("dynamic", many, **dynamic), model("static", many, **static)]
    models += [model("one_dynamic", single, **dynamic), model("one_static", single, **static)]
    path = folder / "ps.json"
    path.write_text(json.dumps({"supportlonglong": True, "models": models}))
    return str(path), rows


def wait() -> None:
    tf.test.experimental.sync_devices()


def take_turns(calls: dict, batches: list, seconds: float, repeat: int) -> dict[str, list[tuple[float, float]]]:
    """Per peer (time until the call returned, time per call of `repeat` calls until the GPU was done), microseconds."""
    taken = {name: [] for name in calls}
    for call in calls.values():
        for batch in batches:
            call(batch)
    end = time.perf_counter() + seconds
    turn = 0
    while turn < 15 or time.perf_counter() < end:
        names = list(calls)
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            batch = batches[turn % len(batches)]
            wait()
            start = time.perf_counter()
            kept = [calls[name](batch)]
            returned = time.perf_counter()
            kept += [calls[name](batch) for _ in range(repeat - 1)]
            wait()
            done = time.perf_counter()
            taken[name].append(((returned - start) * 1e6, (done - start) * 1e6 / repeat))
            del kept
        turn += 1
    return taken


def report(kind: str, taken: dict, base: str, **about) -> None:
    times = {name: np.array(pairs) for name, pairs in taken.items()}
    for name, pairs in times.items():
        ratio = times[base][:, 1] / pairs[:, 1]
        line = {
            "kind": kind,
            "peer": name,
            **about,
            "rounds": len(pairs),
            "returned_us": round(float(np.median(pairs[:, 0])), 1),
            "returned_p99_us": round(float(np.percentile(pairs[:, 0], 99)), 1),
            "done_us": round(float(np.median(pairs[:, 1])), 1),
            "times_as_fast": round(float(np.median(ratio)), 2),
            "beside": base,
        }
        print(json.dumps(line), flush=True)


def measure_ops(rows: np.ndarray, empty_op: str | None, seconds: float) -> None:
    variable = tf.Variable(rows)
    server = server_resource("")
    dynamic, static = [TableRef("one_dynamic", "t", WIDTH)], [TableRef("one_static", "t", WIDTH)]
    peers = {
        "tf.nn.embedding_lookup": lambda ids: tf.nn.embedding_lookup(variable, ids),
        "tf.gather": lambda ids: tf.raw_ops.ResourceGather(resource=variable.handle, indices=ids, dtype=tf.float32),
        "dynamic cache": lambda ids: lookup(server, [ids], dynamic)[0],
        "static cache": lambda ids: lookup(server, [ids], static)[0],
    }
    if empty_op:
        empty = tf.load_op_library(empty_op).hps_benchmark_empty_kernel
    rng = np.random.default_rng(2)
    for batch in (1_024, 16_384, 65_536, 1_048_576):
        batches = [tf.identity(tf.constant(rng.integers(0, SINGLE_ROWS, batch))) for _ in range(8)]
        for name, call in peers.items():
            if not np.array_equal(call(batches[0]), rows[batches[0].numpy()]):
                sys.exit(f"{name} returned wrong rows")
        calls = dict(peers)
        if empty_op:
            calls["empty kernel"] = lambda ids: empty(ids, width=WIDTH)
        report("gpu_op", take_turns(calls, batches, seconds, 10), "tf.nn.embedding_lookup", batch=batch, width=WIDTH)


def dense_layers() -> tuple[list, list]:
    rng = np.random.default_rng(3)

    def layers(*widths):
        pairs = zip(widths, widths[1:])  # noqa: B905
        return [
            (tf.Variable(rng.normal(size=p).astype("f4") / p[0] ** 0.5), tf.Variable(tf.zeros(p[1]))) for p in pairs
        ]

    return layers(FEATURES, 512, 256, WIDTH), layers(WIDTH + TABLES + TABLES**2, 1024, 1024, 512, 256, 1)


def measure_model(rows: np.ndarray, seconds: float) -> None:
    """A recommender: 26 categorical features, one id of each a sample, and 13 numbers.

    "native": a variable a table; "native, one variable": all tables one below the other in one variable, one gather;
    "compiled": by XLA as a whole. All others compile what follows the lookup. Concrete functions are called, as a
    SavedModel's signature is: tf.function's choice among its traces costs as much as the model at small batches.
    "op by op": the lookup is called eagerly, and then the compiled rest, without a function around both. Two bounds:
    "dense part alone" is that rest, of rows that are there; "empty function" has one op that does nothing.
    """
    bottom, top = dense_layers()
    every_row = np.concatenate([np.roll(rows[:ROWS], i, axis=0) for i in range(TABLES)])
    together = tf.Variable(every_row)
    variables = [tf.Variable(part) for part in np.split(every_row, TABLES)]
    offsets = tf.constant(np.arange(TABLES) * ROWS)
    server = server_resource("")

    def through(x, layers):
        for weights, bias in layers[:-1]:
            x = tf.nn.relu(tf.matmul(x, weights) + bias)
        return tf.matmul(x, layers[-1][0]) + layers[-1][1]

    def dense(features, vectors):  # [batch, FEATURES], [batch, TABLES, WIDTH]
        x = through(features, bottom)
        with_each = tf.linalg.matvec(vectors, x)
        products = tf.matmul(vectors, vectors, transpose_b=True)
        return through(tf.concat([x, with_each, tf.reshape(products, [tf.shape(x)[0], TABLES**2])], 1), top)

    compiled = tf.function(dense, jit_compile=True)

    def native(ids, features):
        each = zip(variables, tf.unstack(ids, axis=1), strict=True)
        return compiled(features, tf.stack([tf.nn.embedding_lookup(variable, one) for variable, one in each], axis=1))

    def native_together(ids, features):
        return compiled(features, tf.nn.embedding_lookup(together, ids + offsets))

    refs = {model: [TableRef(model, f"t{i}", WIDTH) for i in range(TABLES)] for model in ("dynamic", "static")}

    def ours(model):
        return tf.function(
            lambda ids, features: compiled(features, lookup_stacked(server, ids, refs[model])), autograph=False
        )

    peers = {
        "native": tf.function(native, autograph=False),
        "native, compiled": tf.function(native, jit_compile=True, autograph=False),
        "native, one variable": tf.function(native_together, autograph=False),
        "native, one variable, compiled": tf.function(native_together, jit_compile=True, autograph=False),
        "dynamic cache": ours("dynamic"),
        "static cache": ours("static"),
    }
    rng = np.random.default_rng(4)
    for batch in BATCHES:
        batches = []
        for _ in range(3):
            ids = tf.identity(tf.constant(rng.integers(0, ROWS, (batch, TABLES))))
            batches.append((ids, tf.identity(tf.constant(rng.normal(size=(batch, FEATURES)).astype("f4")))))
        served = {name: call.get_concrete_function(*batches[0]) for name, call in peers.items()}
        expected = served["native"](*batches[0]).numpy()
        for name, call in served.items():
            if not np.allclose(call(*batches[0]), expected, rtol=1e-2, atol=1e-2):
                sys.exit(f"{name} gave another answer")
        calls = {name: lambda args, call=call: call(*args) for name, call in served.items()}
        vectors = lookup_stacked(server, batches[0][0], refs["static"])
        rest = compiled.get_concrete_function(batches[0][1], vectors)
        nothing = tf.function(lambda x: tf.identity(x), autograph=False).get_concrete_function(batches[0][1])
        for model, tables in refs.items():
            calls[f"{model} cache, op by op"] = lambda args, tables=tables, rest=rest: rest(
                args[1], lookup_stacked(server, args[0], tables)
            )
        calls["dense part alone"] = lambda args, rest=rest, vectors=vectors: rest(args[1], vectors)
        calls["empty function"] = lambda args, nothing=nothing: nothing(args[1])
        report("gpu_model", take_turns(calls, batches, seconds, 3), "native", batch=batch, tables=TABLES, width=WIDTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="")
    parser.add_argument("--empty-op", default="")
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    gpus = tf.config.list_logical_devices("GPU")
    if not gpus:
        sys.exit("TensorFlow sees no GPU here")
    run = describe("python -m benchmarks.gpu_ops")
    run["commit"] = arguments.commit or run["commit"]
    run["gpu"] = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])["device_name"]
    print(json.dumps(run), flush=True)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        config, rows = write_models(Path(folder))
        hps.Init(ps_config_file=config, global_batch_size=BATCHES[-1])
        measure_ops(rows, arguments.empty_op, arguments.seconds)
        measure_model(rows, arguments.seconds)
        hps.shutdown()


if __name__ == "__main__":
    main()
