"""The ops on a GPU: where lookups run, on whose stream, in whose memory, and what is refused.

Where a lookup ran is told by the counters of the model's caches, never by a tensor's device: TensorFlow copies answers
without a word. `./dev test-gpu` runs this file; a machine without a GPU fails it.
"""

import os
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
from cache_counts import looked_up
from conftest import DEFAULT_VALUE, ROWS, make_tables, model_config, run_python, write_config, write_table

import hierarchical_parameter_server as hps
from hierarchical_parameter_server.lookup_ops import Segments, TableRef, lookup, lookup_sparse
from hierarchical_parameter_server.resource import server_resource

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0")

IMPORTS = """
    import sys
    import numpy as np
    import tensorflow as tf
    import hierarchical_parameter_server as hps
    from cache_counts import looked_up
"""


def run_on_gpu(script, *arguments, cwd, gpus=GPUS):
    """A script with a TensorFlow of its own."""
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    return run_python(IMPORTS + script, *arguments, cwd=cwd, CUDA_VISIBLE_DEVICES=gpus, PYTHONPATH=path)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """Tables whose model has caches on GPU 0, served by hps.Init."""
    assert tf.config.list_logical_devices("GPU"), "this machine has no GPU that TensorFlow can use"
    tables = make_tables(tmp_path_factory.mktemp("tables"), gpucache=True, gpucacheper=1.0, init_ec=False)
    hps.shutdown()
    hps.Init(ps_config_file=tables.config, global_batch_size=4)
    yield tables
    hps.shutdown()


def rows_of(keys, *names, with_found=False):
    refs = [TableRef("main", name, 3 if name == "extreme" else int(name[1:])) for name in names]
    return lookup(server_resource(""), keys, refs, with_found)


def of_lengths(ids, lengths):
    splits = tf.constant(np.cumsum([0, *lengths]), tf.int64)
    return Segments(tf.constant(ids), splits, tf.zeros([0], tf.int64), "row_splits")


# ---- dense ----


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("shape", [(), (0,), (1000,), (50, 2, 3)])
def test_rows_come_from_the_cache(on_gpu, rng, dtype, shape):
    ids = rng.integers(0, ROWS, shape)
    before = looked_up()
    for _ in range(2):  # misses, then hits
        answers = rows_of([tf.constant(ids, dtype)] * 5, "w1", "w7", "w16", "w64", "w130")
        for name, rows in zip(("w1", "w7", "w16", "w64", "w130"), answers, strict=True):
            assert "GPU" in rows.device
            np.testing.assert_array_equal(rows, on_gpu.rows[name][ids])
    assert looked_up() > before or ids.size == 0


def test_hits_are_counted_by_table(on_gpu):
    def counts():
        server = hps.stats()["servers"][0]
        (model,) = server["models"]
        return {cache["table"]: cache for cache in model["devices"][0]["caches"]}

    few, many = tf.range(5, dtype=tf.int64), tf.range(20, dtype=tf.int64)
    rows_of([many, many], "w7", "w64")
    before = counts()
    rows_of([few, many], "w7", "w64")
    after = counts()
    for name, asked in (("w7", 5), ("w64", 20), ("w16", 0)):
        added = {what: after[name][what] - before[name][what] for what in ("keys_asked", "rows_served", "rows_missed")}
        assert added["keys_asked"] == asked == added["rows_served"] + added["rows_missed"], name
    assert after["w64"]["hit_rate"] == after["w64"]["rows_served"] / after["w64"]["keys_asked"]


def test_missing_keys_have_the_default(on_gpu):
    ids = np.array([3, -1, ROWS, 2**62, 3])
    rows = rows_of([tf.constant(ids)], "w7")[0].numpy()
    np.testing.assert_array_equal(rows[[0, 4]], on_gpu.rows["w7"][[3, 3]])
    assert (rows[1:4] == DEFAULT_VALUE).all()


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("name", ["w7", "w64"])
def test_stacked_rows(on_gpu, rng, name, dtype):
    ids = rng.integers(0, ROWS + 20, (700, 3))
    width = on_gpu.width(name)
    layer = hps.StackedLookupLayer("main", [name] * 3, width)
    known = np.concatenate([on_gpu.rows[name], np.full((20, width), DEFAULT_VALUE, "f4")])
    before = looked_up()
    for _ in range(2):
        np.testing.assert_array_equal(layer(tf.constant(ids, dtype)), known[ids])
    assert looked_up() > before
    with pytest.raises(tf.errors.InvalidArgumentError, match="last dimension|must be 3"):
        layer(tf.zeros([5, 2], dtype))


def test_found_masks(on_gpu):
    rows, found = rows_of([tf.constant([3, -1, ROWS - 1])], "w7", with_found=True)
    assert found[0].numpy().tolist() == [True, False, True]
    np.testing.assert_array_equal(rows[0][::2], on_gpu.rows["w7"][[3, ROWS - 1]])


def test_producers_and_consumers_on_the_gpu(on_gpu):
    """Ids that a kernel writes just before, rows that one reads just after: a wrong stream shows."""
    rows = tf.constant(on_gpu.rows["w64"])

    @tf.function
    def difference(seed):
        shape = [20_000]
        ids = tf.random.stateless_uniform(shape, [seed, 7], 0, ROWS, tf.int64)
        ids = tf.sort(ids)  # slow enough that a lookup that does not wait would read rubbish
        found = rows_of([ids], "w64")[0]
        return tf.reduce_max(tf.abs(found - tf.gather(rows, ids)))

    worst = []

    def work(first):
        for seed in range(first, first + 50):
            worst.append(float(difference(tf.constant(seed))))

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 200 and max(worst) == 0


def test_wrong_arguments(on_gpu):
    with pytest.raises(tf.errors.InvalidArgumentError, match="emb_vec_size 8"):
        lookup(server_resource(""), [tf.constant([1])], [TableRef("main", "w7", 8)])
    with pytest.raises(tf.errors.NotFoundError, match="no table 'w8'"):
        lookup(server_resource(""), [tf.constant([1])], [TableRef("main", "w8", 8)])


# ---- sparse ----


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["row_splits", "indices"])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_combined_rows_equal_those_of_the_cpu(on_gpu, rng, combiner, weighted, form, dtype):
    lengths = rng.integers(0, 7, 300)
    ids = rng.integers(0, ROWS + 20, lengths.sum()).astype(dtype)
    parts = of_lengths(ids, lengths)
    if form == "indices":
        row = np.repeat(np.arange(300), lengths)
        indices = tf.constant(np.stack([row, np.zeros_like(row)], 1), tf.int64)
        parts = Segments(tf.constant(ids), indices, tf.constant([300, 1], tf.int64), "indices")
    weights = [tf.constant(rng.normal(size=len(ids)).astype("f4"))] * 2 if weighted else None
    refs = [TableRef("main", "w7", 7), TableRef("main", "w64", 64)]

    def combined():
        return lookup_sparse(server_resource(""), [parts] * 2, refs, [combiner] * 2, weights)

    before = looked_up()
    on_device = combined()
    assert looked_up() > before
    with tf.device("CPU:0"):
        on_host = combined()
    for device, host in zip(on_device, on_host, strict=True):
        np.testing.assert_allclose(device, host, rtol=2e-5, atol=2e-5)


def test_gradients_reach_the_weights(on_gpu, rng):
    weights = tf.Variable(rng.normal(size=4).astype("f4"))
    parts = of_lengths(np.array([1, 2, 3, 4]), [2, 0, 2])
    with tf.GradientTape() as tape:
        pooled = lookup_sparse(server_resource(""), [parts], [TableRef("main", "w16", 16)], ["sum"], [weights])[0]
        total = tf.reduce_sum(pooled)
    np.testing.assert_allclose(tape.gradient(total, weights), on_gpu.rows["w16"][1:5].sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("splits", "message"),
    [([0, 2, 1, 4], "row_splits"), ([0, 2, 9], "row_splits"), ([1, 4], "row_splits"), ([0, -5, 4], "row_splits")],
)
def test_bad_splits(on_gpu, splits, message):
    parts = Segments(tf.constant([1, 2, 3, 4]), tf.constant(splits, tf.int64), tf.zeros([0], tf.int64), "row_splits")
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        lookup_sparse(server_resource(""), [parts], [TableRef("main", "w16", 16)], ["sum"])


@pytest.mark.parametrize("indices", [[[1, 0], [0, 0]], [[0, 0], [3, 0]], [[-1, 0], [0, 0]], [[0, 5], [1, 0]]])
def test_bad_indices(on_gpu, indices):
    parts = Segments(tf.constant([1, 2]), tf.constant(indices, tf.int64), tf.constant([3, 2], tf.int64), "indices")
    with pytest.raises(tf.errors.InvalidArgumentError, match="indices"):
        lookup_sparse(server_resource(""), [parts], [TableRef("main", "w16", 16)], ["sum"])


# ---- Keras ----


def test_keras_trains_and_is_not_compiled_by_xla(on_gpu, rng):
    ids = tf.keras.Input((3,), dtype="int64")
    flat = tf.keras.layers.Reshape((21,))(hps.LookupLayer("main", table_name="w7", emb_vec_size=7)(ids))
    model = tf.keras.Model(ids, tf.keras.layers.Dense(1)(flat))
    model.compile("sgd", "mse", jit_compile="auto")
    before = looked_up()
    x = rng.integers(0, ROWS, (64, 3))
    history = model.fit(x, rng.normal(size=(64, 1)), batch_size=16, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert model.predict(x, verbose=0).shape == (64, 1)
    assert looked_up() > before


def test_xla_is_refused(on_gpu):
    function = tf.function(lambda ids: rows_of([ids], "w7")[0], jit_compile=True)
    with pytest.raises(tf.errors.UnimplementedError, match="jit_compile=True"):
        function(tf.constant([1]))


def test_a_compiled_part_beside_the_lookup(on_gpu):
    dense = tf.function(lambda rows: 2 * rows, jit_compile=True)
    twice = tf.function(lambda ids: dense(rows_of([ids], "w7")[0]))
    np.testing.assert_array_equal(twice(tf.constant([1, 2])), 2 * on_gpu.rows["w7"][[1, 2]])


# ---- SavedModels ----


def test_saved_model_in_fresh_processes(on_gpu, tmp_path):
    """With Keras, through the v1 session that TensorFlow Serving uses, and on a machine without a GPU."""
    module = tf.Module()
    module.server = server_resource(on_gpu.config)
    refs = [TableRef("main", "w7", 7)]

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64)])
    def serve(ids):
        return {"rows": lookup(module.server, [ids], refs)[0]}

    module.serve = serve
    tf.saved_model.save(module, str(tmp_path / "model"), signatures={"serving_default": serve})
    load = """
    ids = np.arange(40)
    expected = np.load(sys.argv[2])
    if sys.argv[3] == "v1":
        session = tf.compat.v1.Session(graph=tf.Graph())
        with session.graph.as_default():
            meta = tf.compat.v1.saved_model.load(session, ["serve"], sys.argv[1])
        signature = meta.signature_def["serving_default"]
        rows = session.run(signature.outputs["rows"].name, {signature.inputs["ids"].name: ids})
    else:
        hps._native.ops()
        loaded = tf.saved_model.load(sys.argv[1])
        rows = loaded.signatures["serving_default"](ids=tf.constant(ids))["rows"]
    np.testing.assert_array_equal(rows, expected)
    print("looked up", looked_up())
    """
    np.save(tmp_path / "rows.npy", on_gpu.rows["w7"][:40])
    for how, gpus, count in (("v2", GPUS, 40), ("v1", GPUS, 40), ("v2", "", 0)):
        result = run_on_gpu(load, tmp_path / "model", tmp_path / "rows.npy", how, cwd=tmp_path, gpus=gpus)
        assert f"looked up {count}\n" in result.stdout, (how, gpus, result.stdout)


# ---- memory and devices; each needs a TensorFlow of its own ----


def one_big_table(folder, **model):
    """1 Mi rows of 64 values: 256 MiB."""
    folder.mkdir(exist_ok=True)
    rows = np.arange(1 << 20, dtype="f4")[:, None] * np.ones((1, 64), "f4")
    write_table(folder / "table", np.arange(1 << 20), rows)
    settings = {"gpucache": True, "gpucacheper": 1.0, "max_batch_size": 1024, **model}
    return write_config(folder / "ps.json", [model_config("main", {"w64": (folder / "table", 64)}, **settings)])


INIT = """
    from hierarchical_parameter_server.lookup_ops import TableRef, lookup
    from hierarchical_parameter_server.resource import server_resource

    def check(device="GPU:0", counter=0):
        before = looked_up(counter)
        ids = np.random.default_rng(1).integers(0, 1 << 20, 5000)
        with tf.device(device):
            rows = lookup(server_resource(""), [tf.constant(ids)], [TableRef("main", "w64", 64)])[0]
            assert (rows.numpy() == ids[:, None]).all()
        assert looked_up(counter) > before, (device, counter)
"""


@pytest.mark.parametrize("growth", [False, True])
def test_memory_comes_from_tensorflow_and_goes_back(tmp_path, growth):
    script = (
        INIT
        + """
    gpu = tf.config.list_physical_devices("GPU")[0]
    tf.config.experimental.set_memory_growth(gpu, sys.argv[2] == "True")
    used = lambda: tf.config.experimental.get_memory_info("GPU:0")["current"]
    tf.zeros([])
    before = used()
    hps.Init(ps_config_file=sys.argv[1], global_batch_size=1024)
    assert used() - before > 256 << 20, used() - before
    check()
    hps.shutdown()
    assert used() - before < 16 << 20, used() - before
    """
    )
    run_on_gpu(script, one_big_table(tmp_path), growth, cwd=tmp_path)


def test_logical_gpus_share_a_cache_and_small_memory_is_refused(tmp_path):
    script = (
        INIT
        + """
    gpu = tf.config.list_physical_devices("GPU")[0]
    limits = [tf.config.LogicalDeviceConfiguration(memory_limit=int(m)) for m in sys.argv[2].split(",")]
    tf.config.set_logical_device_configuration(gpu, limits)
    try:
        hps.Init(ps_config_file=sys.argv[1], global_batch_size=1024)
    except hps.errors.ResourceExhaustedError as error:
        print("refused:", error)
        sys.exit()
    check("GPU:0")
    check("GPU:1")
    strategy = tf.distribute.MirroredStrategy(["GPU:0", "GPU:1"])
    with strategy.scope():
        layer = hps.LookupLayer("main", table_name="w64", emb_vec_size=64)
    ids = np.arange(64).reshape(32, 2)
    before = looked_up()
    data = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices(ids).batch(16))
    for batch in data:
        rows = strategy.experimental_local_results(strategy.run(tf.function(lambda x: (x, layer(x))), args=(batch,)))
        for x, found in rows:
            assert (found.numpy() == x.numpy()[..., None]).all()
    assert looked_up() - before == 64, looked_up() - before
    """
    )
    config = one_big_table(tmp_path)
    run_on_gpu(script, config, "2000,1000", cwd=tmp_path)
    result = run_on_gpu(script, config, "200,200", cwd=tmp_path)
    assert "refused: " in result.stdout and "device 0 " in result.stdout and "gpucacheper" in result.stdout, (
        result.stdout
    )


def test_devices_that_are_not_there(tmp_path):
    script = (
        INIT
        + """
    try:
        hps.Init(ps_config_file=sys.argv[1], global_batch_size=1024)
    except hps.errors.InvalidArgumentError as error:
        print("refused:", error)
    """
    )
    config = one_big_table(tmp_path, deployed_device_list=[0, 9])
    result = run_on_gpu(script, config, cwd=tmp_path)
    assert "refused: " in result.stdout and "9" in result.stdout and "deployed_device_list" in result.stdout


def test_without_caches_the_tiers_answer_an_op_on_the_gpu(tmp_path):
    script = (
        INIT
        + """
    hps.Init(ps_config_file=sys.argv[1], global_batch_size=1024)
    ids = np.random.default_rng(1).integers(0, 1 << 20, 5000)
    for dtype in (tf.int32, tf.int64):
        rows = lookup(server_resource(""), [tf.constant(ids, dtype)], [TableRef("main", "w64", 64)])[0]
        assert (rows.numpy() == ids[:, None]).all()
        sparse = tf.SparseTensor([[0, 0], [0, 1], [2, 0]], tf.constant([5, 6, 7], dtype), [3, 2])
        pooled = hps.SparseLookupLayer("main", table_name="w64", emb_vec_size=64)(sparse, combiner="sum")
        assert pooled.numpy()[:, 0].tolist() == [11, 0, 7]
    assert looked_up() == 0
    """
    )
    config = one_big_table(tmp_path, gpucache=False)
    run_on_gpu(script, config, cwd=tmp_path)


def test_whole_tables(tmp_path):
    script = (
        INIT
        + """
    hps.Init(ps_config_file=sys.argv[1], global_batch_size=1024)
    check()
    """
    )
    config = one_big_table(tmp_path, embedding_cache_type="static")
    run_on_gpu(script, config, cwd=tmp_path)


def test_predecessor_ops(on_gpu, tmp_path):
    script = """
    hps.enable_predecessor_ops()
    ops = hps._native.predecessor_ops()
    hps.Init(ps_config_file=sys.argv[1], global_batch_size=16)
    for dtype in (tf.int32, tf.int64):
        rows = ops.lookup(values=tf.constant([1, 2], dtype), global_replica_id=0, init_status="OK", model_name="main",
                          table_id=1, emb_vec_size=7, dtype=tf.float32)
        np.testing.assert_array_equal(rows, np.load(sys.argv[2]))
    assert looked_up() == 4, looked_up()
    """
    np.save(tmp_path / "rows.npy", on_gpu.rows["w7"][[1, 2]])
    run_on_gpu(script, on_gpu.config, tmp_path / "rows.npy", cwd=tmp_path)
