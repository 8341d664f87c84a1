"""StackedLookupLayer and its op: several tables of equal width side by side."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import model_config, write_config, write_table

import hierarchical_parameter_server as hps
from hierarchical_parameter_server.lookup_ops import TableRef, lookup_stacked
from hierarchical_parameter_server.resource import server_resource

TABLES, WIDTH, ROWS = 5, 6, 300


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows [tables, ROWS, width] of the model "side" of hps.Init; unknown ids have the table's number as default."""
    folder = tmp_path_factory.mktemp("stacked")
    values = np.random.default_rng(3).normal(size=(TABLES, ROWS, WIDTH)).astype("f4")
    places = {f"t{i}": (write_table(folder / f"t{i}", np.arange(ROWS), values[i]), WIDTH) for i in range(TABLES)}
    places["wide"] = (write_table(folder / "wide", [1], np.ones((1, 9))), 9)
    defaults = [float(i) for i in range(TABLES + 1)]
    model = model_config("side", places, default_value_for_each_table=defaults)
    hps.shutdown()
    hps.Init(ps_config_file=write_config(folder / "ps.json", [model]), global_batch_size=1)
    return values


def layer(tables=tuple(f"t{i}" for i in range(TABLES)), **arguments):
    return hps.StackedLookupLayer("side", list(tables), WIDTH, **arguments)


def expected(rows, ids):
    return np.stack([rows[t][ids[..., t]] for t in range(TABLES)], axis=-2)


@pytest.mark.parametrize("dtype", ["int32", "int64", "int16"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3000,), (2, 3, 4)])
def test_rows_lie_side_by_side(rows, rng, shape, dtype):
    ids = rng.integers(0, ROWS, (*shape, TABLES))
    found = layer()(tf.constant(ids, dtype))
    assert found.dtype == tf.float32
    np.testing.assert_array_equal(found, expected(rows, ids))
    by_number = layer(range(TABLES))(tf.constant(ids, dtype))
    np.testing.assert_array_equal(by_number, found)


def test_defaults_and_a_table_that_occurs_twice(rows):
    ids = tf.constant([[ROWS, -1, 2**40]])
    found = layer(["t1", "t4", "t1"])(ids)
    np.testing.assert_array_equal(found, np.array([1, 4, 1], "f4")[None, :, None] * np.ones((1, 3, WIDTH)))


def test_equals_the_other_layers(rows, rng):
    ids = rng.integers(0, ROWS, (50, TABLES))
    each = hps.MultiLookupLayer("side", [f"t{i}" for i in range(TABLES)], [WIDTH] * TABLES)
    apart = each([tf.constant(ids[:, t]) for t in range(TABLES)])
    np.testing.assert_array_equal(layer()(ids), tf.stack(apart, axis=1))


def test_in_keras_models(rows, rng, tmp_path):
    ids = tf.keras.Input((TABLES,), dtype="int64")
    stacked = layer(name="stacked")(ids)
    assert tuple(stacked.shape) == (None, TABLES, WIDTH)
    model = tf.keras.Model(ids, tf.keras.layers.Flatten()(stacked))
    x = rng.integers(0, ROWS, (9, TABLES))
    answer = expected(rows, x).reshape(9, -1)
    np.testing.assert_array_equal(model.predict(x, verbose=0), answer)
    model.save(tmp_path / "model.keras")
    again = tf.keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), answer)
    assert again.get_layer("stacked").get_config() == model.get_layer("stacked").get_config()


def test_in_a_saved_model(rows, rng, tmp_path):
    module = tf.Module()
    module.stacked = layer()
    serve = tf.function(module.stacked, input_signature=[tf.TensorSpec([None, TABLES], tf.int64)])
    tf.saved_model.save(module, tmp_path / "model", signatures=serve)
    loaded = tf.saved_model.load(tmp_path / "model")
    ids = rng.integers(0, ROWS, (8, TABLES))
    (found,) = loaded.signatures["serving_default"](tf.constant(ids)).values()
    np.testing.assert_array_equal(found, expected(rows, ids))


def test_in_a_function_of_unknown_shape(rows, rng):
    function = tf.function(layer(), input_signature=[tf.TensorSpec(None, tf.int64)])
    ids = rng.integers(0, ROWS, (4, 2, TABLES))
    np.testing.assert_array_equal(function(ids), expected(rows, ids))
    graph = tf.function(layer(), input_signature=[tf.TensorSpec([None, TABLES], tf.int64)]).get_concrete_function()
    assert graph.outputs[0].shape.as_list() == [None, TABLES, WIDTH]


def test_mixed_precision(rows):
    assert layer(dtype="mixed_float16")(tf.zeros([1, TABLES], tf.int64)).dtype == tf.float16


def test_gradients_stop_at_the_rows(rows):
    with tf.GradientTape() as tape:
        weight = tf.Variable(2.0)
        total = tf.reduce_sum(weight * layer()(tf.zeros([1, TABLES], tf.int64)))
    np.testing.assert_allclose(tape.gradient(total, weight), rows[:, 0].sum(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(TABLES + 1,), (TABLES, 3), ()])
def test_ids_of_another_shape(rows, shape):
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match="last dimension|must be 5|at least rank 1"):
        layer()(tf.zeros(shape, tf.int64))
    function = tf.function(layer(), input_signature=[tf.TensorSpec(None, tf.int64)])
    with pytest.raises(tf.errors.InvalidArgumentError, match="last dimension must count the 5 tables"):
        function(tf.zeros(shape, tf.int64))


def test_refusals(rows):
    with pytest.raises(ValueError, match="at least one table"):
        layer([])
    with pytest.raises(ValueError, match="all names or all numbers"):
        layer(["t0", 1])
    with pytest.raises(TypeError, match="dense tensor"):
        layer()(tf.sparse.from_dense([[1]]))
    with pytest.raises(TypeError, match="int32 or int64"):
        layer()(tf.zeros([1, TABLES]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="table 'wide': rows have 9 values.*emb_vec_size 6"):
        layer(["t0", "wide"])(tf.zeros([1, 2], tf.int64))
    with pytest.raises(tf.errors.NotFoundError, match="no table 'gone'"):
        layer(["gone"])(tf.zeros([1, 1], tf.int64))
    refs = [TableRef("side", "t0", WIDTH), TableRef("side", "wide", 9)]
    with pytest.raises(tf.errors.InvalidArgumentError, match="equally wide, but there are 6 and 9"):
        lookup_stacked(server_resource(""), tf.zeros([1, 2], tf.int64), refs)
    compiled = tf.function(layer(), jit_compile=True)
    with pytest.raises(tf.errors.UnimplementedError, match="jit_compile=True"):
        compiled(tf.zeros([1, TABLES], tf.int64))
