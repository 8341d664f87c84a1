"""LookupLayer and MultiLookupLayer: all kinds of ids against TensorFlow, in all kinds of models, and how they are kept.

Everything here holds for both Kerases: test_legacy_keras.py runs this file with TF_USE_LEGACY_KERAS=1.
"""

import gc
import json
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROWS, WIDTHS, make_tables, model_config, run_python, write_config, write_table

import hierarchical_parameter_server as hps

keras = tf.keras
LEGACY = not hasattr(keras, "ops")
needs_keras3 = pytest.mark.skipif(LEGACY, reason="the same whichever the Keras")
MAX_NORMS = [None, 0, 0.1, 10, "variable"]


def layer_of(tables, table, **arguments):
    return hps.LookupLayer("main", tables.table_id(table), tables.width(table), tf.float32, **arguments)


def norm_of(max_norm):
    return tf.Variable(1.5) if max_norm == "variable" else max_norm


# ---- ids ----


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("max_norm", MAX_NORMS)
def test_equals_embedding_lookup(tables, rng, width, max_norm):
    name = f"w{width}"
    layer = layer_of(tables, name)
    max_norm = norm_of(max_norm)
    for dtype in (tf.int32, tf.int64):
        for shape in ([], [0], [3, 0], [1000], [40, 3], [2, 3, 4, 2]):
            ids = tf.constant(rng.integers(0, ROWS, shape), dtype)
            rows = layer(ids, max_norm=max_norm)
            expected = tf.nn.embedding_lookup(tables.rows[name], ids, max_norm=max_norm)
            assert rows.dtype == tf.float32 and rows.shape == expected.shape
            np.testing.assert_array_equal(rows, expected)  # zeros become NaN under max_norm 0 in both


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.uint32, np.int32, np.int64])
def test_numpy_ids_of_all_integer_types(tables, dtype):
    ids = np.array([[1, 2], [3, 100]], dtype)
    np.testing.assert_array_equal(layer_of(tables, "w7")(ids), tables.rows["w7"][ids])


def test_emb_vec_dtype_in_all_spellings(tables):
    for dtype in (tf.float32, np.float32, "float32", np.dtype("f4")):
        layer = hps.LookupLayer("main", 1, 7, dtype)
        assert layer(np.array([1])).dtype == tf.float32


def test_arguments_by_position_as_the_predecessor_has_them(tables):
    layer = hps.LookupLayer("main", 1, 7, tf.float32, tables.config, 1024, name="rows")
    np.testing.assert_array_equal(layer(np.array([5])), tables.rows["w7"][[5]])
    assert layer.name == "rows"


def test_table_by_name(tables):
    layer = hps.LookupLayer("main", table_name="w16", emb_vec_size=16)
    np.testing.assert_array_equal(layer(np.array([5])), tables.rows["w16"][[5]])


@pytest.mark.parametrize("splits_dtype", [tf.int32, tf.int64])
def test_ragged_ids(tables, splits_dtype):
    ids = tf.RaggedTensor.from_row_lengths(tf.range(6), tf.constant([2, 0, 3, 1], splits_dtype))
    nested = tf.ragged.constant([[[1], []], [], [[2, 3]]], row_splits_dtype=splits_dtype)
    layer = layer_of(tables, "w7")
    for ragged in (ids, nested):
        rows = layer(ragged)
        assert isinstance(rows, tf.RaggedTensor) and rows.ragged_rank == ragged.ragged_rank
        assert rows.row_splits.dtype == splits_dtype
        np.testing.assert_array_equal(rows.flat_values, tables.rows["w7"][ragged.flat_values])
    clipped = tf.nn.embedding_lookup(tables.rows["w7"], ids.flat_values, max_norm=0.5)
    np.testing.assert_array_equal(layer(ids, max_norm=0.5).flat_values, clipped)


def test_large_ids_stay_exact(tables):
    layer = layer_of(tables, "extreme")
    ids = np.array([2**53 + 1, 2**63 - 1, -(2**63), -1], np.int64)
    expected = tables.rows["extreme"][[4, 6, 5, 0]]
    np.testing.assert_array_equal(layer(ids), expected)
    np.testing.assert_array_equal(tf.function(lambda keys: layer(keys))(tf.constant(ids)), expected)


# ---- where layers live ----


def test_in_a_function_of_unknown_shape(tables):
    layer = layer_of(tables, "w16")

    @tf.function(input_signature=[tf.TensorSpec(None, tf.int64)])
    def function(ids):
        return layer(ids)

    for shape in ((), (0,), (4,), (2, 3)):
        ids = np.ones(shape, np.int64)
        np.testing.assert_array_equal(function(ids), tables.rows["w16"][ids])


def test_layers_of_a_function_are_not_serialised(tables):
    layers = [layer_of(tables, "w16") for _ in range(4)]
    function = tf.function(lambda ids: [layer(ids) for layer in layers])
    graph = function.get_concrete_function(tf.TensorSpec([None], tf.int64)).graph
    nodes = [op for op in graph.get_operations() if op.type == "HierarchicalParameterServer>Lookup"]
    assert len(nodes) == 4 and not any(node.control_inputs for node in nodes)


def test_in_a_dataset(tables):
    layer = layer_of(tables, "w7")
    dataset = tf.data.Dataset.from_tensor_slices(np.arange(10)).batch(4).map(layer, num_parallel_calls=2)
    np.testing.assert_array_equal(np.concatenate(list(dataset.as_numpy_iterator())), tables.rows["w7"][:10])


def test_functional_model(tables, rng):
    ids = keras.Input((3,), dtype="int64")
    rows = layer_of(tables, "w7")(ids, max_norm=1.0)
    assert tuple(rows.shape) == (None, 3, 7)
    model = keras.Model(ids, rows)
    batch = rng.integers(0, ROWS, (10, 3))
    expected = tf.nn.embedding_lookup(tables.rows["w7"], batch, max_norm=1.0)
    np.testing.assert_array_equal(model(batch), expected)
    np.testing.assert_array_equal(model.predict(batch, verbose=0), expected)


def test_functional_model_with_ragged_input(tables):
    ids = keras.Input((None,), dtype="int64", ragged=True)
    model = keras.Model(ids, layer_of(tables, "w7")(ids))
    rows = model(tf.ragged.constant([[1, 2], [], [3]], dtype=tf.int64))
    np.testing.assert_array_equal(rows.flat_values, tables.rows["w7"][[1, 2, 3]])


def test_sequential_model(tables):
    model = keras.Sequential([keras.Input((2,), dtype="int32"), layer_of(tables, "w7"), keras.layers.Flatten()])
    assert tuple(model.output_shape) == (None, 14)
    batch = np.array([[1, 2], [3, 4]], np.int32)
    np.testing.assert_array_equal(model.predict(batch, verbose=0), tables.rows["w7"][batch].reshape(2, 14))


def test_subclassed_model(tables):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.rows = layer_of(tables, "w7")

        def call(self, ids):
            return tf.reduce_sum(self.rows(ids), axis=1)

    batch = np.array([[1, 2], [3, 4]])
    rows = tables.rows["w7"][batch]
    np.testing.assert_allclose(Model().predict(batch, verbose=0), rows[:, 0] + rows[:, 1])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(tables, policy):
    layer = layer_of(tables, "w7", dtype=policy)
    ids = np.array([1, 2])
    compute = tf.as_dtype(policy.removeprefix("mixed_"))
    assert layer(ids).dtype == compute
    expected = tf.cast(tf.nn.embedding_lookup(tables.rows["w7"], ids, max_norm=0.5), compute)
    for max_norm in (0.5, tf.Variable(0.5)):
        assert np.array_equal(layer(ids, max_norm=max_norm), expected)
    large = layer_of(tables, "extreme", dtype=policy)(np.array([2**53 + 1]))
    assert np.array_equal(large[0], tf.cast(tables.rows["extreme"][4], compute))


def test_max_norm_variable_is_read_at_each_call(tables):
    layer = layer_of(tables, "w7")
    max_norm = tf.Variable(0.5)
    function = tf.function(lambda ids: layer(ids, max_norm=max_norm))
    ids = tf.constant([1, 2])
    for value in (0.5, 0.1):
        max_norm.assign(value)
        np.testing.assert_array_equal(function(ids), tf.nn.embedding_lookup(tables.rows["w7"], ids, max_norm=value))


def test_no_weights_and_no_xla(tables):
    layer = layer_of(tables, "w7")
    layer(np.array([1]))
    assert layer.weights == [] and layer.trainable_weights == []
    assert layer.supports_jit is False
    with tf.GradientTape() as tape:
        scale = tf.Variable(3.0)
        loss = tf.reduce_sum(scale * layer(tf.constant([1, 2])))
    np.testing.assert_allclose(tape.gradient(loss, scale), tables.rows["w7"][[1, 2]].sum(), rtol=1e-5)


def test_mask_zero(tables):
    ids = np.array([[0, 2], [3, 0]])
    masking = layer_of(tables, "w7", mask_zero=True)
    np.testing.assert_array_equal(masking.compute_mask(ids), ids != 0)
    ragged = tf.ragged.constant([[0, 2], [3]])
    np.testing.assert_array_equal(masking.compute_mask(ragged).flat_values, [False, True, True])
    assert layer_of(tables, "w7").compute_mask(ids) is None
    pooled = keras.Sequential(
        [
            keras.Input((2,), dtype="int64"),
            layer_of(tables, "w7", mask_zero=True),
            keras.layers.GlobalAveragePooling1D(),
        ]
    )
    np.testing.assert_allclose(pooled(ids), tables.rows["w7"][[2, 3]], rtol=1e-6)


def test_a_hundred_tables_in_one_model(tmp_path, no_server, rng):
    rows = rng.normal(size=(100, 20, 4)).astype("f4")
    places = {f"t{i}": (write_table(tmp_path / f"t{i}", np.arange(20), rows[i]), 4) for i in range(100)}
    hps.Init(ps_config_file=write_config(tmp_path / "ps.json", [model_config("wide", places)]), global_batch_size=8)
    ids = rng.integers(0, 20, (8, 100))
    expected = np.stack([rows[i][ids[:, i]] for i in range(100)], axis=1)

    inputs = keras.Input((100,), dtype="int64")
    layers = [hps.LookupLayer("wide", i, 4) for i in range(100)]
    separate = keras.Model(inputs, [layer(inputs[:, i]) for i, layer in enumerate(layers)])
    np.testing.assert_array_equal(np.stack(separate(ids), axis=1), expected)

    fused = hps.MultiLookupLayer("wide", list(places), [4] * 100)
    function = tf.function(lambda ids: tf.stack(fused(tf.unstack(ids, axis=1)), axis=1))
    np.testing.assert_array_equal(function(tf.constant(ids)), expected)
    graph = function.get_concrete_function(tf.TensorSpec([8, 100], tf.int64)).graph
    assert [op.type for op in graph.get_operations()].count("HierarchicalParameterServer>Lookup") == 1


# ---- MultiLookupLayer ----


def mixed_layer(**arguments):
    names = ["w7", "w16", "w1", "w64", "w130", "w7"]
    combiners = [None, "sum", None, "mean", "sqrtn", "sum"]
    return hps.MultiLookupLayer("main", names, [int(name[1:]) for name in names], combiners, **arguments)


def mixed_ids(rng):
    """Dense, sparse, ragged, sparse with weights, padded and ragged ids."""
    sparse = tf.sparse.from_dense(rng.integers(1, ROWS, (4, 3)) * rng.integers(0, 2, (4, 3)))
    ragged = tf.RaggedTensor.from_row_lengths(rng.integers(0, ROWS, 6), [2, 0, 3, 1])
    more_ragged = tf.RaggedTensor.from_row_lengths(rng.integers(0, ROWS, 5), [0, 0, 5, 0])
    weighted = tf.sparse.from_dense(rng.integers(1, ROWS, (4, 2)))
    dense = rng.integers(0, ROWS, (4, 5))
    padded = rng.integers(1, ROWS, (4, 3))
    padded[1] = padded[3, 0] = -1
    weights = weighted.with_values(tf.constant(rng.uniform(0.5, 2, len(weighted.values)), tf.float32))
    return [dense, sparse, ragged, weighted, padded, more_ragged], [None, None, None, weights, None, None]


def combined_rows(rows, ids, combiner, weights=None):
    """The combined rows of each line of ids, with zeros for lines without, by TensorFlow."""
    if not isinstance(ids, tf.SparseTensor):
        ids = (ids if isinstance(ids, tf.RaggedTensor) else tf.ragged.boolean_mask(ids, ids != -1)).to_sparse()
    output = np.zeros((int(ids.dense_shape[0]), rows.shape[1]), "f4")
    combined = tf.nn.embedding_lookup_sparse(rows, ids, weights, combiner=combiner)
    output[: len(combined)] = combined
    return output


def test_multi_lookup_of_dense_and_sparse_tables(tables, rng):
    ids, weights = mixed_ids(rng)
    actual = mixed_layer(padding_value=-1)(ids, weights=weights)
    np.testing.assert_array_equal(actual[0], tables.rows["w7"][ids[0]])
    np.testing.assert_array_equal(actual[1], combined_rows(tables.rows["w16"], ids[1], "sum"))
    np.testing.assert_array_equal(actual[2].flat_values, tables.rows["w1"][ids[2].values])
    np.testing.assert_array_equal(actual[2].row_splits, ids[2].row_splits)
    np.testing.assert_allclose(
        actual[3], combined_rows(tables.rows["w64"], ids[3], "mean", weights[3]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(actual[4], combined_rows(tables.rows["w130"], tf.constant(ids[4]), "sqrtn"))
    np.testing.assert_array_equal(actual[5], combined_rows(tables.rows["w7"], ids[5], "sum"))


def test_multi_lookup_is_few_ops(tables, rng):
    """One op for the plain tables; one for each kind of combined ones: sparse, sparse with weights, row splits."""
    layer = mixed_layer(padding_value=-1)
    ids, weights = mixed_ids(rng)
    ids[2] = tf.cast(ids[2], tf.int64)
    function = tf.function(lambda ids, weights: layer(ids, weights=weights))
    graph = function.get_concrete_function([tf.convert_to_tensor(ids[0]), *ids[1:]], weights).graph
    types = [op.type for op in graph.get_operations()]
    assert types.count("HierarchicalParameterServer>Lookup") == 1
    assert types.count("HierarchicalParameterServer>LookupSparse") == 3


def test_multi_lookup_in_a_functional_model(tables, rng, tmp_path):
    dense = keras.Input((5,), dtype="int64", name="dense")
    sparse = keras.Input((9,), dtype="int64", sparse=True, name="sparse")
    layer = hps.MultiLookupLayer("main", [1, 2], [7, 16], [None, "mean"])
    outputs = layer([dense, sparse])
    assert [tuple(output.shape) for output in outputs] == [(None, 5, 7), (None, 16)]
    model = keras.Model([dense, sparse], outputs)
    ids = [tf.constant(rng.integers(0, ROWS, (4, 5))), tf.sparse.from_dense(rng.integers(1, ROWS, (4, 9)))]
    expected = [tables.rows["w7"][ids[0].numpy()], combined_rows(tables.rows["w16"], ids[1], "mean")]
    for a, b in zip(model(ids), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    model.save(tmp_path / "m.keras")
    for a, b in zip(keras.models.load_model(tmp_path / "m.keras")(ids), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_multi_lookup_of_both_widths_of_keys(tables):
    layer = hps.MultiLookupLayer("main", ["w7", "w16"], [7, 16])
    rows = layer([np.array([1], np.int32), np.array([2], np.int64)])
    np.testing.assert_array_equal(rows[0], tables.rows["w7"][[1]])
    np.testing.assert_array_equal(rows[1], tables.rows["w16"][[2]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tables": []}, ValueError, "at least one table"),
        ({"tables": ["a", 1]}, ValueError, "all names or all numbers"),
        ({"tables": ["a"]}, ValueError, "equally long, got 1, 2 and 1"),
        ({"combiners": ["sum"]}, ValueError, "equally long, got 2, 2 and 1"),
        ({"combiners": ["sum", "max"]}, ValueError, "combiner must be one of sum, mean, sqrtn, got 'max'"),
        ({"emb_vec_sizes": [7, 0]}, ValueError, "emb_vec_size must be"),
    ],
)
def test_multi_lookup_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        hps.MultiLookupLayer(**{"model_name": "main", "tables": [1, 2], "emb_vec_sizes": [7, 16], **arguments})


def test_multi_lookup_inputs(tables):
    layer = hps.MultiLookupLayer("main", [1, 2], [7, 16], [None, "sum"])
    sparse = tf.sparse.from_dense([[1]])
    with pytest.raises(ValueError, match="has 2 tables and got ids for 1"):
        layer([np.array([1])])
    with pytest.raises(ValueError, match="has 2 tables and got weights for 1"):
        layer([np.array([1]), sparse], weights=[None])
    with pytest.raises(ValueError, match="table 1 has no combiner and takes no weights"):
        layer([np.array([1]), sparse], weights=[np.array([1.0]), None])
    with pytest.raises(TypeError, match="table 1 has no combiner and takes no SparseTensor"):
        layer([sparse, sparse])


# ---- how layers are kept ----


@pytest.mark.parametrize(
    "make",
    [
        lambda config: hps.LookupLayer("main", 1, 7, tf.float32, config, 64, mask_zero=True, name="a"),
        lambda config: hps.LookupLayer("main", table_name="w7", emb_vec_size=7, dtype="mixed_float16"),
        lambda config: hps.SparseLookupLayer("main", 1, 7, np.float32, config, padding_value=-1, name="b"),
        lambda config: hps.SparseLookupLayer("main", table_name="w7", emb_vec_size=np.int64(7)),
        lambda config: hps.MultiLookupLayer("main", [1, 2], [7, 16], [None, "sum"], config, padding_value=0, name="c"),
    ],
)
def test_get_config(disk, make):
    layer = make(disk.config)
    config = layer.get_config()
    again = type(layer).from_config(json.loads(json.dumps(config)) if not LEGACY else config)
    assert again.get_config() == config
    assert again.name == layer.name and again.ps_config_file == layer.ps_config_file
    assert config["model_name"] == "main"


def test_keras_file(tables, tmp_path, rng):
    ids = keras.Input((3,), dtype="int64")
    model = keras.Model(ids, keras.layers.Dense(2)(layer_of(tables, "w7", name="rows")(ids, max_norm=0.5)))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    batch = rng.integers(0, ROWS, (4, 3))
    np.testing.assert_array_equal(loaded(batch), model(batch))
    assert loaded.get_layer("rows").get_config() == model.get_layer("rows").get_config()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(batch), model(batch))


def test_hdf5_file(tables, tmp_path, rng):
    """The format holds weights and a config; the layers have the latter only."""
    ids = keras.Input((3,), dtype="int64")
    model = keras.Model(ids, keras.layers.Dense(2)(layer_of(tables, "w7")(ids)))
    model.save(tmp_path / "m.h5")
    batch = rng.integers(0, ROWS, (4, 3))
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "m.h5", compile=False)(batch), model(batch))


# ---- initialisation ----


def test_layers_built_and_traced_before_init(disk, no_server):
    """A script may build everything first: the server is looked for at the first real lookup."""
    layer = layer_of(disk, "w7")
    inputs = keras.Input((2,), dtype="int64")
    model = keras.Model(inputs, layer(inputs))
    function = tf.function(lambda ids: layer(ids))
    function.get_concrete_function(tf.TensorSpec([None, 2], tf.int64))
    batch = np.array([[1, 2]])
    for call in (layer, model, function):
        with pytest.raises(tf.errors.FailedPreconditionError, match="hps.Init"):
            call(batch)
    hps.Init(ps_config_file=disk.config, global_batch_size=1)
    for call in (layer, model, function):
        np.testing.assert_array_equal(call(batch), disk.rows["w7"][batch])


def test_own_configuration_opens_at_the_first_lookup(disk, no_server):
    layer = layer_of(disk, "w7", ps_config_file=disk.config, global_batch_size=1)
    assert hps.stats()["servers"] == []
    np.testing.assert_array_equal(layer(np.array([1])), disk.rows["w7"][[1]])
    assert len(hps.stats()["servers"]) == 1
    hps.shutdown()
    assert hps.stats()["servers"] == []
    np.testing.assert_array_equal(layer(np.array([1])), disk.rows["w7"][[1]])  # opens it again


def test_equal_configurations_share_a_server(disk, tmp_path, no_server):
    """Equal in meaning: another file, other spacing, relative paths."""
    copy = disk.folder / "copy.json"
    config = json.loads(pathlib.Path(disk.config).read_text())
    config["models"][0]["sparse_files"] = [os.path.basename(p) for p in config["models"][0]["sparse_files"]]
    copy.write_text(json.dumps(config))
    hps.Init(ps_config_file=disk.config, global_batch_size=1)
    layers = [layer_of(disk, "w7", ps_config_file=path) for path in (disk.config, disk.config, copy)]
    for layer in layers:
        np.testing.assert_array_equal(layer(np.array([1])), disk.rows["w7"][[1]])
    assert len(hps.stats()["servers"]) == 1


def test_two_configurations_side_by_side(disk, tmp_path, no_server):
    other = make_tables(tmp_path / "other", seed=7)
    layers = [layer_of(t, "w7", ps_config_file=t.config) for t in (disk, other)]
    hps.Init(ps_config_file=disk.config, global_batch_size=1)
    for layer, expected in zip(layers, (disk, other), strict=True):
        np.testing.assert_array_equal(layer(np.array([1])), expected.rows["w7"][[1]])
    np.testing.assert_array_equal(layer_of(disk, "w7")(np.array([1])), disk.rows["w7"][[1]])
    assert len(hps.stats()["servers"]) == 2


def test_the_last_layer_frees_its_server(disk, no_server):
    layer = layer_of(disk, "w7", ps_config_file=disk.config)
    tf.function(layer)(tf.constant([1]))
    assert len(hps.stats()["servers"]) == 1
    del layer
    gc.collect()
    assert hps.stats()["servers"] == []


def test_relative_configuration_path(disk, no_server, monkeypatch):
    monkeypatch.chdir(disk.folder)
    layer = layer_of(disk, "w7", ps_config_file="ps.json")
    assert layer.get_config()["ps_config_file"] == "ps.json"
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(layer(np.array([1])), disk.rows["w7"][[1]])


@needs_keras3
def test_gpu_keys_on_a_host_without_one(disk, tmp_path):
    """gpucache and deployed_device_list serve from the CPU, with one warning."""
    script = """
        import sys, numpy as np, hierarchical_parameter_server as hps
        hps.Init(ps_config_file=sys.argv[1], global_batch_size=1)
        layer = hps.LookupLayer("main", 1, 7, np.float32)
        layer(np.array([1])), layer(np.array([1]))
    """
    config = json.loads(pathlib.Path(disk.config).read_text())
    config["models"][0].update(gpucache=True, deployed_device_list=[0])
    (tmp_path / "ps.json").write_text(json.dumps(config))
    result = run_python(script, tmp_path / "ps.json", cwd=tmp_path)
    lines = [line for line in (result.stderr + result.stdout).splitlines() if "GPU" in line and "hps" in line.lower()]
    assert len(lines) == 1 and "CPU" in lines[0], result.stderr[-3000:]


FORK = """
    import os, sys
    import numpy as np, tensorflow as tf, hierarchical_parameter_server as hps
    config = sys.argv[1]
    hps.Init(ps_config_file=config, global_batch_size=1)
    layers = [hps.LookupLayer("main", 1, 7), hps.LookupLayer("main", 1, 7, ps_config_file=config)]
    ids = tf.constant([1])
    for layer in layers:
        layer(ids)
    child = os.fork()
    if child == 0:
        failed = 0
        for layer in layers:
            try:
                layer(ids)
            except tf.errors.FailedPreconditionError as error:
                failed += "spawn" in str(error) and "fork" in str(error)
        os._exit(failed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    for layer in layers:
        assert layer(ids).shape == (1, 7)
    print("served on")
"""


@needs_keras3
def test_a_forked_child_is_told_to_spawn(disk, tmp_path):
    assert "served on" in run_python(FORK, disk.config, cwd=tmp_path).stdout


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"emb_vec_size": None}, "emb_vec_size must be the width"),
        ({"emb_vec_size": 0}, "got 0"),
        ({"emb_vec_size": 7.5}, "got 7.5"),
        ({"emb_vec_size": True}, "got True"),
        ({"table_id": None}, "exactly one of table_id .* and table_name"),
        ({"table_name": "w7"}, "exactly one of table_id"),
        ({"emb_vec_size": 2**40}, "emb_vec_size must be .* got 1099511627776"),
        ({"table_id": -1}, "table_id must be a number from 0 to 2147483647, got -1"),
        ({"table_id": 2**32}, "table_id must be a number from 0 to 2147483647, got 4294967296"),
        ({"table_id": None, "table_name": "w7:7,w16"}, "table_name must be a name of 1 to 120 letters.*w7:7,w16"),
        ({"model_name": "a/b"}, "model_name must be a name of 1 to 120 letters.*a/b"),
        ({"model_name": "m" * 500}, "model_name must be a name.*of 500 characters"),
        ({"table_id": "w7"}, "table's name goes into table_name"),
        ({"table_id": None, "table_name": ""}, "table_name must be a non-empty string"),
        ({"model_name": ""}, "model_name must be the name of a model"),
        ({"emb_vec_dtype": tf.float16}, "emb_vec_dtype must be tf.float32.*got float16.*dtype policy"),
        ({"emb_vec_dtype": tf.int32}, "emb_vec_dtype must be tf.float32"),
    ],
)
@pytest.mark.parametrize("kind", ["LookupLayer", "SparseLookupLayer"])
def test_layer_arguments(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(hps, kind)(**{"model_name": "main", "table_id": 1, "emb_vec_size": 7, **arguments})


@pytest.mark.parametrize("padding", [1.5, True, [1], "x", 2**63, -(2**63) - 1])
def test_padding_that_is_no_id(padding):
    with pytest.raises(ValueError, match="padding_value must be None or an integer that an int64 id can be"):
        hps.SparseLookupLayer("main", 1, 7, padding_value=padding)
    with pytest.raises(ValueError, match="padding_value must be"):
        hps.MultiLookupLayer("main", [1], [7], ["sum"], padding_value=padding)


def test_ids_of_a_wrong_kind(tables):
    layer = layer_of(tables, "w7")
    for ids in (np.array([1.0]), tf.constant([1.0]), tf.constant(["1"]), tf.constant([True])):
        with pytest.raises(TypeError, match="ids must be int32 or int64, but have dtype (float|string|bool).*tf.cast"):
            layer(ids)
    with pytest.raises(TypeError, match="uint64"):
        layer(np.array([1], np.uint64))
    with pytest.raises(TypeError, match='ids must be int32 or int64, but have dtype float32.*dtype="int64"'):
        layer(keras.Input((3,)))
    with pytest.raises(TypeError, match="use SparseLookupLayer for a SparseTensor"):
        layer(tf.sparse.from_dense([[1]]))


@pytest.mark.parametrize(
    ("model", "table", "width", "error", "message"),
    [
        ("nobody", 0, 1, tf.errors.NotFoundError, "nobody"),
        ("main", 99, 1, tf.errors.InvalidArgumentError, "has no table 99; it has 6 tables"),
        ("main", 0, 2, tf.errors.InvalidArgumentError, "have 1 values.*emb_vec_size 2"),
    ],
)
def test_wrong_names_are_found_at_the_lookup(tables, tmp_path, model, table, width, error, message):
    layer = hps.LookupLayer(model, table, width)
    inputs = keras.Input((2,), dtype="int64")
    keras_model = keras.Model(inputs, layer(inputs))
    with pytest.raises(error, match=message):
        layer(np.array([1]))
    with pytest.raises(error, match=message):
        keras_model.predict(np.array([[1, 2]]), verbose=0)


def test_own_configuration_that_is_not_there(tmp_path, no_server):
    layer = hps.LookupLayer("main", 0, 1, ps_config_file=str(tmp_path / "no.json"))
    with pytest.raises(tf.errors.NotFoundError, match="no configuration file.*no.json"):
        layer(np.array([1]))
