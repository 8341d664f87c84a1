"""SparseLookupLayer: sparse, ragged and padded ids, weights and max_norm against tf.nn.embedding_lookup_sparse.

Everything here holds for both Kerases: test_legacy_keras.py runs this file with TF_USE_LEGACY_KERAS=1.
"""

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROWS, WIDTHS

import hierarchical_parameter_server as hps

keras = tf.keras
LEGACY = not hasattr(keras, "ops")
COMBINERS = ["sum", "mean", "sqrtn"]
MAX_NORMS = [None, 0.1, 10, "variable"]
InvalidArgumentError = tf.errors.InvalidArgumentError


def layer_of(tables, table, **arguments):
    return hps.SparseLookupLayer("main", tables.table_id(table), tables.width(table), tf.float32, **arguments)


def norm_of(max_norm):
    return tf.Variable(1.5) if max_norm == "variable" else max_norm


def sparse_ids(rng, lengths, dtype=np.int64):
    """SparseTensor with these numbers of ids in its rows."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    columns = np.concatenate([np.arange(length) for length in lengths])
    ids = rng.integers(0, ROWS, len(rows)).astype(dtype)
    return tf.SparseTensor(np.stack([rows, columns], 1).astype(np.int64), ids, [len(lengths), max(lengths)])


def some_weights(rng, ids):
    return ids.with_values(tf.constant(rng.uniform(0.2, 2, len(ids.values)).astype("f4")))


def tensorflow_lookup(table, ids, weights=None, combiner="mean", max_norm=None):
    """TensorFlow's answer, with zeros for its missing rows at the end."""
    combined = tf.nn.embedding_lookup_sparse(table, ids, weights, combiner=combiner, max_norm=max_norm).numpy()
    missing = int(ids.dense_shape[0]) - len(combined)
    return np.concatenate([combined, np.zeros((missing, table.shape[1]), "f4")])


# ---- equality ----


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("max_norm", MAX_NORMS)
def test_equals_embedding_lookup_sparse(tables, rng, width, max_norm):
    """Bit-equal, for rows of 0 .. 70 ids; empty rows are zeros, at the end too."""
    ids = sparse_ids(rng, [*range(71), 0, 0])
    layer = layer_of(tables, f"w{width}")
    max_norm = norm_of(max_norm)
    for combiner in COMBINERS:
        expected = tensorflow_lookup(tables.rows[f"w{width}"], ids, None, combiner, max_norm)
        combined = layer(ids, combiner=combiner, max_norm=max_norm)
        assert combined.shape == (73, width) and combined.dtype == tf.float32
        np.testing.assert_array_equal(combined, expected, combiner)
        assert not np.any(combined[0]) and not np.any(combined[-2:])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("max_norm", [None, 0.5, 10])
def test_weights_against_float64(tables, rng, width, max_norm):
    """Within 1e-6 of sum(|w x|) / denominator."""
    lengths = np.arange(1, 71)
    ids = sparse_ids(rng, lengths)
    weights = some_weights(rng, ids)
    w = weights.values.numpy().astype("f8")[:, None]
    x = tf.nn.embedding_lookup(tables.rows[f"w{width}"], ids.values, max_norm=max_norm).numpy().astype("f8")
    starts = np.cumsum([0, *lengths[:-1]])
    below = {"sum": 1, "mean": np.add.reduceat(w, starts), "sqrtn": np.sqrt(np.add.reduceat(w * w, starts))}
    layer = layer_of(tables, f"w{width}")
    for combiner in COMBINERS:
        combined = layer(ids, weights, combiner=combiner, max_norm=max_norm)
        expected = np.add.reduceat(w * x, starts) / below[combiner]
        scale = np.add.reduceat(np.abs(w * x), starts) / below[combiner]
        assert np.max(np.abs(combined - expected) / scale) <= 1e-6
        theirs = tensorflow_lookup(tables.rows[f"w{width}"], ids, weights, combiner, max_norm)
        np.testing.assert_allclose(combined, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_integer_types(tables, rng, dtype, max_norm):
    ids = sparse_ids(rng, [3, 0, 2])
    ids = ids.with_values(tf.constant(ids.values.numpy() % 100, dtype))
    expected = tensorflow_lookup(tables.rows["w7"], tf.cast(ids, tf.int64), max_norm=max_norm)
    np.testing.assert_array_equal(layer_of(tables, "w7")(ids, max_norm=max_norm), expected)


def test_mean_is_the_default(tables, rng):
    ids = sparse_ids(rng, [3, 1])
    layer = layer_of(tables, "w7")
    expected = tensorflow_lookup(tables.rows["w7"], ids)
    for arguments in ((ids,), (ids, None), (ids, None, None, None, None)):
        np.testing.assert_array_equal(layer(*arguments), expected)
    np.testing.assert_array_equal(layer(sp_ids=ids, sp_weights=None, name="n", combiner="mean"), expected)


def test_name_of_the_output(tables, rng):
    ids = sparse_ids(rng, [3, 1])
    for policy in ("float32", "mixed_float16"):
        layer = layer_of(tables, "w7", dtype=policy)
        output = tf.function(lambda: layer(ids, name="pooled")).get_concrete_function().outputs[0]  # noqa: B023
        assert output.op.inputs[0].op.name.split("/")[-1] == "pooled"


def test_higher_ranks_combine_along_all_but_the_first(tables):
    ids = tf.SparseTensor([[0, 0, 1], [0, 2, 0], [2, 1, 1]], [5, 6, 7], [4, 3, 2])
    for max_norm in (None, 0.5):
        expected = tensorflow_lookup(tables.rows["w7"], ids, None, "sum", max_norm)
        combined = layer_of(tables, "w7")(ids, combiner="sum", max_norm=max_norm)
        np.testing.assert_array_equal(combined, expected)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_nothing_to_look_up(tables, max_norm):
    layer = layer_of(tables, "w7")
    for shape in ([0, 0], [0, 5], [4, 0], [4, 5]):
        empty = tf.SparseTensor(np.zeros((0, 2), np.int64), np.zeros(0, np.int64), shape)
        for weights in (None, empty.with_values(np.zeros(0, "f4"))):
            np.testing.assert_array_equal(layer(empty, weights, max_norm=max_norm), np.zeros((shape[0], 7)))
    for shape in ([0, 0], [0, 5], [4, 0]):
        np.testing.assert_array_equal(layer(np.zeros(shape, np.int64), max_norm=max_norm), np.zeros((shape[0], 7)))
    ragged = tf.RaggedTensor.from_row_lengths(np.zeros(0, np.int64), [0, 0])
    np.testing.assert_array_equal(layer(ragged, max_norm=max_norm), np.zeros((2, 7)))


# ---- other forms of ids ----


@pytest.mark.parametrize("splits_dtype", [tf.int32, tf.int64])
@pytest.mark.parametrize("max_norm", MAX_NORMS)
def test_ragged_ids(tables, rng, splits_dtype, max_norm):
    lengths = [2, 0, 3, 70, 0]
    ids = rng.integers(0, ROWS, sum(lengths))
    ragged = tf.RaggedTensor.from_row_lengths(ids, tf.constant(lengths, splits_dtype))
    weights = ragged.with_flat_values(tf.constant(rng.uniform(0.2, 2, len(ids)), tf.float32))
    max_norm = norm_of(max_norm)
    layer = layer_of(tables, "w16")
    for combiner in COMBINERS:
        combined = layer(ragged, combiner=combiner, max_norm=max_norm)
        expected = tensorflow_lookup(tables.rows["w16"], ragged.to_sparse(), None, combiner, max_norm)
        np.testing.assert_array_equal(combined, expected)
        weighted = layer(ragged, weights, combiner=combiner, max_norm=max_norm)
        same = layer(ragged.to_sparse(), weights.to_sparse(), combiner=combiner, max_norm=max_norm)
        np.testing.assert_array_equal(weighted, same)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_dense_ids(tables, rng, max_norm):
    ids = rng.integers(0, ROWS, (6, 9))
    sparse = tf.RaggedTensor.from_tensor(ids).to_sparse()
    for combiner in COMBINERS:
        combined = layer_of(tables, "w16")(ids, combiner=combiner, max_norm=max_norm)
        expected = tensorflow_lookup(tables.rows["w16"], sparse, None, combiner, max_norm)
        np.testing.assert_array_equal(combined, expected)


@pytest.mark.parametrize("padding", [-1, 0])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_dense_ids_with_padding(tables, rng, padding, max_norm):
    """Padding may stand anywhere in a row; a row of padding alone is zero, the last one too."""
    ids = rng.integers(1, ROWS, (5, 4))
    ids[0, 1] = ids[2, 0] = ids[1] = ids[4] = padding
    weights = rng.uniform(0.2, 2, ids.shape).astype("f4")
    ragged = tf.ragged.boolean_mask(ids, ids != padding)
    ragged_weights = tf.ragged.boolean_mask(weights, ids != padding)
    layer = layer_of(tables, "w16", padding_value=padding)
    for combiner in COMBINERS:
        expected = tensorflow_lookup(tables.rows["w16"], ragged.to_sparse(), None, combiner, max_norm)
        np.testing.assert_array_equal(layer(ids, combiner=combiner, max_norm=max_norm), expected)
        np.testing.assert_array_equal(
            layer(ids, weights, combiner=combiner, max_norm=max_norm),
            layer(ragged, ragged_weights, combiner=combiner, max_norm=max_norm),
        )


def test_minus_one_is_a_key_unless_it_is_padding(tables):
    ids = np.array([[-1, 0], [-1, -1]])
    rows = tables.rows["extreme"]  # its first two keys are -1 and 0
    combined = layer_of(tables, "extreme")(ids, combiner="sum")
    np.testing.assert_array_equal(combined, [rows[0] + rows[1], rows[0] + rows[0]])
    combined = layer_of(tables, "extreme", padding_value=-1)(ids, combiner="sum")
    np.testing.assert_array_equal(combined, [rows[1], np.zeros(3)])


@pytest.mark.parametrize("padding", [2**40 + 1, -(2**33) + 1])
def test_padding_outside_of_the_ids_type_is_no_id(tables, padding):
    layer = layer_of(tables, "w16", padding_value=padding)
    rows = tables.rows["w16"]
    combined = layer(tf.constant([[1, 0]], tf.int32), combiner="sum")
    np.testing.assert_array_equal(combined, [rows[1] + rows[0]])
    combined = layer(tf.constant([[1, padding]], tf.int64), combiner="sum")
    np.testing.assert_array_equal(combined, [rows[1]])


# ---- where layers live ----


def test_in_a_function_of_unknown_shape(tables, rng):
    layer = layer_of(tables, "w16", padding_value=-1)
    sparse = sparse_ids(rng, [2, 0, 5, 0])
    weights = some_weights(rng, sparse)

    @tf.function(input_signature=[tf.SparseTensorSpec(None, tf.int64), tf.SparseTensorSpec(None, tf.float32)])
    def of_sparse(ids, weights):
        return layer(ids), layer(ids, weights), layer(ids, max_norm=0.5), layer(ids, weights, max_norm=0.5)

    for a, b in zip(of_sparse(sparse, weights), of_sparse.python_function(sparse, weights), strict=True):
        np.testing.assert_array_equal(a, b)

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int64), tf.TensorSpec(None, tf.float32)])
    def of_dense(ids, weights):
        combined = layer(ids, weights)
        assert combined.shape.as_list() == [None, 16]
        return combined

    dense = rng.integers(-1, ROWS, (3, 4))
    ones = np.ones((3, 4), "f4")
    np.testing.assert_allclose(of_dense(dense, ones), layer(dense), rtol=1e-5, atol=1e-6)
    for shape in ((3, 5), (4, 4), (4, 3), (3, 4, 1), (12,)):
        with pytest.raises(InvalidArgumentError, match="sp_weights must have the shape of sp_ids|Incompatible shapes"):
            of_dense(dense, np.ones(shape, "f4"))


def test_functional_model(tables, rng):
    ids = keras.Input((70,), dtype="int64", sparse=True)
    weights = keras.Input((70,), sparse=True)
    layer = layer_of(tables, "w16")
    outputs = [layer(ids, combiner="sum"), layer(ids, weights, combiner="mean", max_norm=0.5)]
    assert [tuple(output.shape) for output in outputs] == [(None, 16), (None, 16)]
    model = keras.Model([ids, weights], outputs)
    batch = sparse_ids(rng, [3, 0, 70, 0])
    batch_weights = some_weights(rng, batch)
    expected = [layer(batch, combiner="sum"), layer(batch, batch_weights, combiner="mean", max_norm=0.5)]
    for a, b in zip(model([batch, batch_weights]), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    dataset = tf.data.Dataset.from_tensors(((batch, batch_weights),))
    for a, b in zip(model.predict(dataset, verbose=0), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_functional_model_with_ragged_and_dense_inputs(tables, rng):
    ragged = keras.Input((None,), dtype="int64", ragged=True)
    dense = keras.Input((4,), dtype="int64")
    layer = layer_of(tables, "w16", padding_value=0)
    model = keras.Model([ragged, dense], [layer(ragged), layer(dense)])
    batch = tf.RaggedTensor.from_row_lengths(rng.integers(0, ROWS, 5), [2, 0, 3])
    padded = tf.constant(rng.integers(0, 2, (3, 4)))
    for a, b in zip(model([batch, padded]), [layer(batch), layer(padded)], strict=True):
        np.testing.assert_array_equal(a, b)


def test_keras_file(tables, tmp_path, rng):
    ids = keras.Input((70,), dtype="int64", sparse=True)
    weights = keras.Input((70,), sparse=True)
    layer = layer_of(tables, "w16", name="pooled")
    model = keras.Model([ids, weights], [layer(ids, None, combiner="sqrtn"), layer(ids, weights, max_norm=0.5)])
    model.save(tmp_path / "m.keras")
    batch = sparse_ids(rng, [3, 0, 70])
    inputs = [batch, some_weights(rng, batch)]
    for a, b in zip(keras.models.load_model(tmp_path / "m.keras")(inputs), model(inputs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(tables, rng, policy):
    """The sum is made in float32 with the weights as they are; only the output is narrowed."""
    ids = sparse_ids(rng, [3, 0, 40])
    weights = some_weights(rng, ids)
    wide = layer_of(tables, "w16")(ids, weights, combiner="sum", max_norm=1.5)
    narrow = layer_of(tables, "w16", dtype=policy)(ids, weights, combiner="sum", max_norm=tf.Variable(1.5))
    assert narrow.dtype == tf.as_dtype(policy.removeprefix("mixed_"))
    assert np.array_equal(narrow, tf.cast(wide, narrow.dtype))


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_gradients_reach_the_weights(tables, rng, combiner, max_norm):
    """As TensorFlow's own, from sparse and from padded dense weights."""
    ids = sparse_ids(rng, [3, 4, 1, 6])
    start = tf.constant(rng.uniform(0.5, 2, len(ids.values)).astype("f4"))
    upstream = tf.constant(rng.normal(size=(4, 16)).astype("f4"))
    layer = layer_of(tables, "w16", padding_value=-1)

    def gradient(function, weights):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss = tf.reduce_sum(function(weights) * upstream)
        return tape.gradient(loss, weights).numpy()

    theirs = gradient(
        lambda w: tf.nn.embedding_lookup_sparse(
            tables.rows["w16"], ids, ids.with_values(w), combiner=combiner, max_norm=max_norm
        ),
        start,
    )
    ours = gradient(lambda w: layer(ids, ids.with_values(w), combiner=combiner, max_norm=max_norm), start)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    dense = tf.sparse.to_dense(ids, default_value=-1)
    dense_start = tf.sparse.to_dense(ids.with_values(start))
    padded = gradient(lambda w: layer(dense, w, combiner=combiner, max_norm=max_norm), dense_start)
    np.testing.assert_allclose(padded[dense != -1], theirs, rtol=1e-3, atol=1e-4)
    assert not np.any(padded[dense == -1])


def test_wider_and_narrower_weights(tables, rng):
    ids = sparse_ids(rng, [3, 4])
    weights = some_weights(rng, ids)
    expected = layer_of(tables, "w7")(ids, weights)
    for dtype, tolerance in ((tf.float64, 0), (tf.float16, 1e-2), (tf.bfloat16, 5e-2)):
        combined = layer_of(tables, "w7")(ids, tf.cast(weights, dtype))
        np.testing.assert_allclose(combined, expected, rtol=tolerance, atol=tolerance)


def test_no_weights_of_its_own(tables, rng):
    layer = layer_of(tables, "w7")
    layer(sparse_ids(rng, [3]))
    assert layer.weights == [] and layer.supports_jit is False


# ---- refusals ----


SORTED = [[0, 0], [0, 1], [2, 0]]
OUT_OF_ORDER = [[0, 0], [2, 0], [0, 1]]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("rows", [2**40, 2**62, 2**63 - 1])
def test_more_rows_than_memory(tables, traced, rows):
    # A served model takes the dense shape from its clients: it must not end the process.
    layer = layer_of(tables, "w7")

    def call(shape):
        return layer(tf.SparseTensor(tf.constant([[0, 0]], tf.int64), tf.constant([1]), shape))

    with pytest.raises((tf.errors.ResourceExhaustedError, InvalidArgumentError)):
        (tf.function(call) if traced else call)(tf.constant([rows, 2], tf.int64))
    assert layer(tf.ragged.constant([[1]])).shape == (1, 7)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("indices", "shape", "message"),
    [
        (OUT_OF_ORDER, [3, 2], "rows must not descend.*tf.sparse.reorder"),
        (SORTED, [2, 2], "outside the dense shape|within the dense shape"),
        (SORTED, [3, 1], "outside the dense shape|within the dense shape"),
        ([[0, 0], [0, -1], [2, 0]], [3, 2], "outside the dense shape|within the dense shape"),
    ],
)
def test_indices_that_do_not_fit(tables, max_norm, weighted, traced, indices, shape, message):
    layer = layer_of(tables, "w7")
    ids = tf.SparseTensor(tf.constant(indices, tf.int64), tf.constant([1, 2, 3]), tf.constant(shape, tf.int64))
    weights = ids.with_values(tf.ones(3)) if weighted else None

    def call(ids, weights):
        return layer(ids, weights, max_norm=max_norm)

    with pytest.raises(InvalidArgumentError, match=message):
        (tf.function(call) if traced else call)(ids, weights)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_weights_of_another_length(tables, max_norm, count):
    ids = tf.SparseTensor(tf.constant(SORTED, tf.int64), tf.constant([1, 2, 3]), [3, 2])
    columns = np.arange(count)
    weights = tf.SparseTensor(np.stack([0 * columns, columns], 1).astype(np.int64), tf.ones(count), [3, 4])
    with pytest.raises(InvalidArgumentError, match="each id needs one weight"):
        layer_of(tables, "w7")(ids, weights, max_norm=max_norm)
    ragged = tf.ragged.constant([[1, 2], [], [3]])
    with pytest.raises(InvalidArgumentError, match="each id needs one weight"):
        layer_of(tables, "w7")(ragged, tf.RaggedTensor.from_row_lengths(tf.ones(count), [count]), max_norm=max_norm)


def test_dense_weights_of_another_shape(tables):
    with pytest.raises((ValueError, InvalidArgumentError), match="sp_weights must have the shape of sp_ids"):
        layer_of(tables, "w7")(np.ones((2, 3), np.int64), np.ones((3, 2), "f4"))


def test_ids_and_weights_of_a_wrong_kind(tables):
    layer = layer_of(tables, "w7")
    sparse = tf.sparse.from_dense([[1, 2]])
    with pytest.raises(TypeError, match="ids must be int32 or int64, but have dtype float32"):
        layer(tf.cast(sparse, tf.float32))
    with pytest.raises(TypeError, match="ids must be int32 or int64, but have dtype float32"):
        layer(tf.ragged.constant([[1.0]]))
    with pytest.raises(TypeError, match="ids must be int32 or int64, but have dtype float32"):
        layer(np.ones((2, 2), "f4"))
    with pytest.raises(TypeError, match="ids must be int32 or int64, but have dtype float32"):
        layer(keras.Input((3,), sparse=True))
    with pytest.raises(TypeError, match="sp_weights must be floating point, but have dtype int32"):
        layer(sparse, sparse)
    with pytest.raises(TypeError, match="same kind as sp_ids: got .*Tensor weights for SparseTensor ids"):
        layer(sparse, tf.ones([1, 2]))
    with pytest.raises(TypeError, match="same kind as sp_ids: got SparseTensor weights"):
        layer(tf.ones([1, 2], tf.int64), tf.cast(sparse, tf.float32))
    with pytest.raises(TypeError, match="same kind as sp_ids: got .*Tensor weights for RaggedTensor ids"):
        layer(tf.ragged.constant([[1]]), tf.ones([1, 1]))


def test_ranks(tables):
    layer = layer_of(tables, "w7")
    with pytest.raises(ValueError, match=r"ids must have rank 2, \[rows, ids per row\]"):
        layer(np.array([1, 2]))
    with pytest.raises(ValueError, match="ids must have rank 2"):
        layer(np.ones((2, 2, 2), np.int64))
    with pytest.raises(ValueError, match="ids must have rank 2"):
        layer(tf.SparseTensor([[0]], [1], [2]))
    with pytest.raises(ValueError, match="ragged ids must have rank 2"):
        layer(tf.ragged.constant([[[1], []], []]))


def test_unknown_combiner(tables):
    with pytest.raises(ValueError, match="combiner must be one of sum, mean, sqrtn, got 'max'"):
        layer_of(tables, "w7")(tf.sparse.from_dense([[1]]), combiner="max")


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_wrong_names_are_found_at_the_lookup(tables, max_norm):
    ids = tf.sparse.from_dense([[1]])
    for layer, error, message in (
        (hps.SparseLookupLayer("nobody", 0, 1), tf.errors.NotFoundError, "nobody"),
        (hps.SparseLookupLayer("main", 99, 1), InvalidArgumentError, "has no table 99"),
        (hps.SparseLookupLayer("main", 0, 2), InvalidArgumentError, "emb_vec_size 2"),
        (hps.SparseLookupLayer("main", table_name="no", emb_vec_size=2), tf.errors.NotFoundError, "no"),
    ):
        with pytest.raises(error, match=message):
            layer(ids, max_norm=max_norm)
