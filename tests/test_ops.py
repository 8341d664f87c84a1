"""The ops themselves: shape functions, equality with TensorFlow, how they behave in graphs, and each refusal."""

import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from conftest import DEFAULT_VALUE, EXTREME_KEYS, ROWS, WIDTHS, make_tables, model_config, write_config, write_table

import hierarchical_parameter_server as hps
from hierarchical_parameter_server import _native
from hierarchical_parameter_server.lookup_ops import Segments, TableRef, lookup, lookup_sparse
from hierarchical_parameter_server.resource import server_resource

InvalidArgumentError = tf.errors.InvalidArgumentError


def reference(name, width, model="main"):
    return TableRef(model, name, width)


def plain(keys, *names, server=None, with_found=False, model="main"):
    """Rows of tables "w<width>", asked for by name."""
    refs = [reference(name, 3 if name == "extreme" else int(name[1:]), model) for name in names]
    return lookup(server or server_resource(""), keys, refs, with_found)


def no_shape():
    return tf.zeros([0], tf.int64)


def of_lengths(ids, lengths):
    """The segments of rows with these numbers of ids, as row splits."""
    return Segments(tf.constant(ids), tf.constant(np.cumsum([0, *lengths]), tf.int64), no_shape(), "row_splits")


# ---- shapes ----


def shapes_in_graph(keys_specs, build):
    function = tf.function(build, input_signature=keys_specs).get_concrete_function()
    return [str(output.shape) for output in function.outputs]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([], "(7,)"),
        ([5], "(5, 7)"),
        ([None], "(None, 7)"),
        ([None, 3], "(None, 3, 7)"),
        ([2, None, 4], "(2, None, 4, 7)"),
        (None, "<unknown>"),
    ],
)
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_lookup_shape_function(shape, expected, dtype):
    assert shapes_in_graph([tf.TensorSpec(shape, dtype)], lambda keys: plain([keys], "w7")) == [expected]


def test_lookup_shape_function_of_several_tables_and_found():
    specs = [tf.TensorSpec([None, 2], tf.int64), tf.TensorSpec([4], tf.int64)]
    build = lambda a, b: plain([a, b], "w7", "w16", with_found=True)  # noqa: E731
    assert shapes_in_graph(specs, build) == ["(None, 2, 7)", "(4, 16)", "(None, 2)", "(4,)"]


@pytest.mark.parametrize(("splits", "expected"), [([None], "(None, 7)"), ([9], "(8, 7)"), (None, "(None, 7)")])
def test_sparse_shape_function_of_row_splits(splits, expected):
    def build(ids, row_splits):
        segments = Segments(ids, row_splits, no_shape(), "row_splits")
        return lookup_sparse(server_resource(""), [segments], [reference("w7", 7)], ["sum"])

    assert shapes_in_graph([tf.TensorSpec([None], tf.int64), tf.TensorSpec(splits, tf.int64)], build) == [expected]


def test_sparse_shape_function_of_indices():
    def build(ids, indices, dense_shape):
        refs = [reference("w7", 7)] * 3
        shapes = [dense_shape, tf.constant([6, 4], tf.int64), tf.stack([tf.constant(5, tf.int64), dense_shape[0]])]
        segments = [Segments(ids, indices, shape, "indices") for shape in shapes]
        return lookup_sparse(server_resource(""), segments, refs, ["sum"] * 3)

    specs = [tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, 2], tf.int64), tf.TensorSpec([2], tf.int64)]
    assert shapes_in_graph(specs, build) == ["(None, 7)", "(6, 7)", "(5, 7)"]


@pytest.mark.parametrize(
    ("tables_attribute", "message"),
    [
        ("main/w7:7,w16:16", "tables has 2 entries for 1 key tensors"),
        ("main/w7:0", "emb_vec_size must be positive, got 0"),
        ("main/w7:-1", "emb_vec_size must be positive, got -1"),
        ("", "tables must be like model/table:width,table:width"),
        ("main", "tables must be like .* but are \"main\""),
        ("main/", "tables must be like"),
        ("/w7:7", "tables must be like"),
        ("main/w7", "tables must be like"),
        ("main/:7", "tables must be like"),
        ("main/w7:seven", "tables must be like"),
        ("main/w7:7,", "tables must be like"),
        ("main/#:7", "tables must be like"),
        ("main/#one:7", "tables must be like"),
        ("main/w7:99999999999", "tables must be like"),
    ],
)
def test_attributes_are_checked_when_the_graph_is_built(tables_attribute, message):
    @tf.function
    def build(keys):
        handle = server_resource("").handle
        return _native.ops().hierarchical_parameter_server_lookup(server=handle, keys=[keys], tables=tables_attribute)

    with pytest.raises(ValueError, match=message):
        build.get_concrete_function(tf.TensorSpec([3], tf.int64))


# ---- plain lookups ----


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0), (17,), (5, 3), (2, 3, 2, 2), (4000,)])
def test_lookup_equals_tensorflow(tables, rng, width, dtype, shape):
    ids = rng.integers(0, ROWS, shape).astype(dtype)
    name = f"w{width}"
    expected = tf.nn.embedding_lookup(tables.rows[name], ids)
    actual = plain([tf.constant(ids)], name)[0]
    assert actual.shape == expected.shape == (*shape, width)
    np.testing.assert_array_equal(actual, expected)


def test_every_key_is_legal(tables):
    rows = plain([EXTREME_KEYS.reshape(1, -1)], "extreme")[0]
    np.testing.assert_array_equal(rows[0], tables.rows["extreme"])


def test_found_mask_and_default_value(tables):
    ids = np.array([[0, -7], [ROWS, ROWS - 1]])
    (rows, others), (found, others_found) = plain([ids, [ids[0, 0]]], "w16", "w7", with_found=True)
    np.testing.assert_array_equal(found, [[True, False], [False, True]])
    np.testing.assert_array_equal(rows[~found.numpy()], np.full((2, 16), DEFAULT_VALUE, "f4"))
    np.testing.assert_array_equal(rows[found.numpy()], tables.rows["w16"][[0, ROWS - 1]])
    np.testing.assert_array_equal(others_found, [True])
    np.testing.assert_array_equal(others, tables.rows["w7"][:1])


def test_tables_by_number_and_many_in_one_call(tables, rng):
    ids = [rng.integers(0, ROWS, [n]) for n in range(1, 6)]
    refs = [reference(i, width) for i, width in enumerate(WIDTHS)]
    for rows, keys, width in zip(lookup(server_resource(""), ids, refs), ids, WIDTHS, strict=True):
        np.testing.assert_array_equal(rows, tables.rows[f"w{width}"][keys])


def test_batch_above_the_configured_limit_is_served(tables, rng):
    ids = rng.integers(0, ROWS, [70_000])  # max_batch_size is 4
    np.testing.assert_array_equal(plain([ids], "w16")[0], tables.rows["w16"][ids])


# ---- sparse lookups ----


@pytest.mark.parametrize("width", WIDTHS)
def test_sparse_lookup_adds_in_the_order_of_tensorflow(tables, rng, width):
    """Rows of 1 .. 70 ids, all combiners, as row splits and as indices."""
    lengths = np.arange(1, 71)
    ids = rng.integers(0, ROWS, lengths.sum())
    rows = np.repeat(np.arange(len(lengths)), lengths)
    columns = np.concatenate([np.arange(length) for length in lengths])
    sparse = tf.SparseTensor(np.stack([rows, columns], 1), ids, [len(lengths), 70])
    name = f"w{width}"
    combiners = ["sum", "mean", "sqrtn"]
    by_splits = [of_lengths(ids, lengths)] * 3
    by_indices = [Segments(sparse.values, sparse.indices, sparse.dense_shape, "indices")] * 3
    for segments in (by_splits, by_indices):
        actual = lookup_sparse(server_resource(""), segments, [reference(name, width)] * 3, combiners)
        for combiner, combined in zip(combiners, actual, strict=True):
            expected = tf.nn.embedding_lookup_sparse(tables.rows[name], sparse, None, combiner=combiner)
            np.testing.assert_array_equal(combined, expected, combiner)


def test_sparse_lookup_of_empty_rows_and_nothing(tables):
    segments = of_lengths([3, 4], [0, 2, 0, 0])
    combined = lookup_sparse(server_resource(""), [segments], [reference("w7", 7)], ["sum"])[0]
    np.testing.assert_array_equal(combined[1], tables.rows["w7"][3] + tables.rows["w7"][4])
    np.testing.assert_array_equal(np.delete(combined, 1, axis=0), np.zeros((3, 7)))
    for lengths in ([], [0, 0]):
        nothing = of_lengths(np.zeros(0, np.int64), lengths)
        combined = lookup_sparse(server_resource(""), [nothing], [reference("w7", 7)], ["mean"])[0]
        np.testing.assert_array_equal(combined, np.zeros((len(lengths), 7)))


def weighted(rows, weights, lengths, combiner):
    """The definition, in float64, and the scale that its error is measured by."""
    outputs, scales, first = [], [], 0
    for length in lengths:
        x, w = rows[first : first + length].astype("f8"), weights[first : first + length].astype("f8")[:, None]
        first += length
        below = {"sum": 1.0, "mean": w.sum(), "sqrtn": np.sqrt((w * w).sum())}[combiner]
        outputs.append((w * x).sum(0) / below if length else np.zeros(rows.shape[1]))
        scales.append(np.abs(w * x).sum(0) / abs(below) if length else np.ones(rows.shape[1]))
    return np.array(outputs), np.array(scales)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_weights_against_float64(tables, rng, width, combiner):
    lengths = np.arange(71)
    ids = rng.integers(0, ROWS, lengths.sum())
    weights = rng.uniform(0.1, 3, len(ids)).astype("f4") * rng.choice([1, 1, 1, -0.1], len(ids)).astype("f4")
    name = f"w{width}"
    expected, scale = weighted(tables.rows[name][ids], weights, lengths, combiner)
    actual = lookup_sparse(
        server_resource(""), [of_lengths(ids, lengths)], [reference(name, width)], [combiner], [tf.constant(weights)]
    )[0]
    assert np.max(np.abs(actual - expected) / scale) <= 1e-6


def test_weights_that_add_up_to_zero_give_zeros(tables):
    weights = [tf.constant([1.0, -1.0, 0.0])]
    for combiner in ("mean", "sqrtn"):
        segments = of_lengths([3, 4, 5], [2, 1])
        combined = lookup_sparse(server_resource(""), [segments], [reference("w7", 7)], [combiner], weights)[0]
        np.testing.assert_array_equal(combined[1], np.zeros(7))
        assert np.all(np.isfinite(combined))


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("form", ["indices", "row_splits"])
def test_gradient_of_the_weights(tables, rng, combiner, form):
    """Against TensorFlow's own gradient, and against finite differences of the op."""
    lengths = [3, 0, 1, 12, 0]
    ids = rng.integers(0, ROWS, sum(lengths))
    weights = tf.constant(rng.uniform(0.5, 2, len(ids)).astype("f4"))
    upstream = tf.constant(rng.normal(size=(len(lengths), 16)).astype("f4"))
    segments = of_lengths(ids, lengths)
    row_ids = segments.row_ids()
    sparse = tf.SparseTensor(tf.stack([row_ids, tf.range(len(ids), dtype=tf.int64)], 1), ids, [5, len(ids)])
    if form == "indices":
        segments = Segments(sparse.values, sparse.indices, sparse.dense_shape, "indices")

    @tf.function
    def value(weights):
        combined = lookup_sparse(server_resource(""), [segments], [reference("w16", 16)], [combiner], [weights])[0]
        return tf.reduce_sum(combined * upstream)

    def tensorflow_value(weights):
        sparse_weights = tf.SparseTensor(sparse.indices, weights, sparse.dense_shape)
        combined = tf.nn.embedding_lookup_sparse(tables.rows["w16"], sparse, sparse_weights, combiner=combiner)
        return tf.reduce_sum(combined * upstream[:4])  # its trailing empty row is missing

    gradients = []
    for function in (value, tensorflow_value):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            result = function(weights)
        gradients.append(tape.gradient(result, weights).numpy())
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    step = 0.05
    for i in (0, 3, 9):
        bump = step * tf.one_hot(i, len(ids))
        slope = (value(weights + bump) - value(weights - bump)) / (2 * step)
        assert abs(slope - gradients[0][i]) <= 0.01 * max(1, abs(gradients[0][i]))


def test_gradients_stop_at_the_rows(tables):
    scale = tf.Variable(2.0)
    with tf.GradientTape() as tape:
        ids = tf.constant([1, 2])
        rows = plain([ids], "w7")[0]
        tape.watch(rows)
        loss = tf.reduce_sum(scale * rows)
    assert tape.gradient(loss, scale) == tf.reduce_sum(rows)
    with tf.GradientTape() as tape:
        weights = tf.Variable([1.0, 1.0])
        combined = lookup_sparse(
            server_resource(""), [of_lengths([1, 2], [2])], [reference("w7", 7)], ["sum"], [weights]
        )[0]
        loss = tf.reduce_sum(scale * combined)
    assert set(tape.gradient(loss, {"scale": scale, "weights": weights})) == {"scale", "weights"}


# ---- graphs ----


def lookup_nodes(concrete):
    return [op for op in concrete.graph.get_operations() if op.type.startswith("HierarchicalParameterServer>Lookup")]


def test_lookups_of_a_function_are_not_serialised():
    @tf.function
    def function(keys):
        return [plain([keys + i], "w7")[0] for i in range(8)]

    nodes = lookup_nodes(function.get_concrete_function(tf.TensorSpec([None], tf.int64)))
    assert len(nodes) == 8
    assert all(not node.control_inputs for node in nodes)


def test_lookups_of_constants_are_not_folded(tmp_path, no_server):
    """A table that is replaced answers anew, also where the ids are constants of the graph."""
    folders = [write_table(tmp_path / name, [5], [[value] * 4]) for name, value in (("old", 1.0), ("new", 2.0))]
    models = [model_config("folding", {"t": (folder, 4)}) for folder in folders]
    hps.Init(ps_config_file=write_config(tmp_path / "ps.json", models[:1]), global_batch_size=1)

    @tf.function
    def function():
        rows = lookup(server_resource(""), [tf.constant([5])], [TableRef("folding", "t", 4)])[0]
        segments = Segments(tf.constant([5]), tf.constant([0, 1], tf.int64), no_shape(), "row_splits")
        combined = lookup_sparse(server_resource(""), [segments], [TableRef("folding", "t", 4)], ["sum"])[0]
        return rows + combined

    np.testing.assert_array_equal(function(), [[2.0] * 4])
    hps.servers()[0].replace_model(models[1])
    np.testing.assert_array_equal(function(), [[4.0] * 4])


def test_every_server_of_the_process_can_be_reached_and_scraped(no_server, tmp_path):
    newer, layers = {}, []
    for name in ("a", "b"):
        folder = write_table(tmp_path / name, np.arange(4), np.full((4, 3), 1.0))
        model = model_config(name, {"t": (folder, 3)})
        renewed = write_table(tmp_path / f"new_{name}", np.arange(4), np.full((4, 3), 2.0))
        newer[name] = {**model, "sparse_files": [renewed]}
        config = write_config(tmp_path / f"{name}.json", [model])
        if name == "a":
            hps.Init(ps_config_file=config, global_batch_size=1)
        layers.append(hps.LookupLayer(name, 0, 3, "float32", ps_config_file="" if name == "a" else config))
    for layer in layers:
        np.testing.assert_array_equal(layer(np.array([1, 2])), np.full((2, 3), 1.0))
    servers = hps.servers()
    assert [server.models for server in servers] == [["a"], ["b"]]
    for server, name, layer in zip(servers, newer, layers, strict=True):
        server.replace_model(newer[name])
        np.testing.assert_array_equal(layer(np.array([1])), np.full((1, 3), 2.0))
    text = hps.prometheus_text()
    assert text.count("# TYPE hps_keys_asked_total counter\n") == 1
    hashes = [server["config_hash"] for server in hps.stats()["servers"]]
    for config_hash, name in zip(hashes, newer, strict=True):
        assert f'hps_keys_asked_total{{server="{config_hash}",model="{name}",table="t"}} 3\n' in text


def test_datasets(tables):
    ids = np.arange(12)
    dataset = tf.data.Dataset.from_tensor_slices(ids).batch(5).map(lambda keys: plain([keys], "w7")[0])
    np.testing.assert_array_equal(np.concatenate(list(dataset.as_numpy_iterator())), tables.rows["w7"][:12])


def test_jit_compilation_is_refused_by_name(tables):
    function = tf.function(lambda keys: plain([keys], "w7")[0], jit_compile=True)
    with pytest.raises(tf.errors.UnimplementedError, match="compiled by XLA.*jit_compile=True"):
        function(tf.constant([1]))
    segments = of_lengths([1, 2], [2])
    inner = tf.function(lambda: lookup_sparse(server_resource(""), [segments], [reference("w7", 7)], ["sum"])[0])
    outer = tf.function(lambda: inner(), jit_compile=True)
    with pytest.raises(tf.errors.UnimplementedError, match="compiled by XLA"):
        outer()


def test_a_jitted_function_may_use_the_rows(tables):
    dense = tf.function(lambda rows: 2 * rows, jit_compile=True)
    outer = tf.function(lambda keys: dense(plain([keys], "w7")[0]))
    np.testing.assert_array_equal(outer(tf.constant([1])), 2 * tables.rows["w7"][1:2])


# ---- refusals ----


@pytest.mark.parametrize(
    ("refs", "error", "message"),
    [
        ([TableRef("nobody", "w7", 7)], tf.errors.NotFoundError, "nobody.*main"),
        ([TableRef("main", "w8", 7)], tf.errors.NotFoundError, "w8.*w7"),
        ([TableRef("main", "w7:7,w16", 16)], ValueError, "a table must be a name of 1 to 120 letters.*w7:7,w16"),
        ([TableRef("main", 6, 7)], InvalidArgumentError, "has no table 6; it has 6 tables, numbered from 0"),
        ([TableRef("main", -1, 7)], InvalidArgumentError, "table_id must not be negative, got -1"),
        ([TableRef("main", "w7", 8)], InvalidArgumentError, "'w7'.*have 7 values.*emb_vec_size 8"),
    ],
)
def test_unknown_names_and_widths(tables, refs, error, message):
    segments = of_lengths([1], [1])
    with pytest.raises(error, match=message):
        lookup(server_resource(""), [tf.constant([1])], refs)
    with pytest.raises(error, match=message):
        lookup_sparse(server_resource(""), [segments], refs, ["sum"])
    with pytest.raises(error, match=message):
        tf.function(lambda: lookup(server_resource(""), [tf.constant([1])], refs))()


def test_float_keys():
    handle = server_resource("").handle
    with pytest.raises((TypeError, InvalidArgumentError), match="float"):
        _native.ops().hierarchical_parameter_server_lookup(server=handle, keys=[tf.constant([1.0])], tables="main/w7:7")


INDICES = [[0, 0], [0, 1], [2, 0]]


@pytest.mark.parametrize(
    ("indices", "shape", "weights", "message"),
    [
        ([[0, 0], [2, 0], [0, 1]], [3, 2], None, r"rows must not descend, but indices\[2, 0\] = 0 follows 2.*reorder"),
        (INDICES, [2, 2], None, r"indices\[2, 0\] = 2 lies outside the dense shape, whose dimension 0 is 2"),
        (INDICES, [3, 1], None, r"indices\[1, 1\] = 1 lies outside the dense shape, whose dimension 1 is 1"),
        ([[0, 0], [0, -1], [2, 0]], [3, 2], None, r"indices\[1, 1\] = -1 lies outside"),
        ([[-1, 0], [0, 1], [2, 0]], [3, 2], None, r"indices\[0, 0\] = -1 lies outside"),
        (INDICES, [-1, 2], None, "lies outside the dense shape|negative"),
        (INDICES, [3], None, "dense_shape must have 2 entries to match the indices"),
        (INDICES[:2], [3, 2], None, r"indices must have the shape \[3, rank\], one line per id"),
        (INDICES, [3, 2], [1.0, 2.0], "2 weights for 3 ids; each id needs one weight"),
        (INDICES, [3, 2], [1.0], "1 weights for 3 ids"),
    ],
)
def test_sparse_ids_that_do_not_fit(tables, indices, shape, weights, message):
    segments = Segments(tf.constant([1, 2, 3]), tf.constant(indices, tf.int64), tf.constant(shape, tf.int64), "indices")
    with pytest.raises(InvalidArgumentError, match=message):
        lookup_sparse(
            server_resource(""), [segments], [reference("w7", 7)], ["sum"], weights and [tf.constant(weights)]
        )


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([0, 2], "row_splits must begin with 0 and end with the number of keys, 3"),
        ([1, 3], "row_splits must begin with 0"),
        ([0, 2, 1, 3], r"row_splits must not descend, but splits\[2\] is 1 after 2"),
        ([], r"row_splits must have the shape \[rows \+ 1\]"),
    ],
)
def test_row_splits_that_do_not_fit(tables, splits, message):
    segments = Segments(tf.constant([1, 2, 3]), tf.constant(splits, tf.int64), no_shape(), "row_splits")
    with pytest.raises(InvalidArgumentError, match=message):
        lookup_sparse(server_resource(""), [segments], [reference("w7", 7)], ["sum"])


def test_combiners_and_weights_of_all_tables_or_none(tables):
    segments = [of_lengths([1], [1])] * 2
    refs = [reference("w7", 7)] * 2
    with pytest.raises(InvalidArgumentError, match="combiners must name one combiner for each of the 2 tables"):
        lookup_sparse(server_resource(""), segments, refs, ["sum"])
    with pytest.raises(InvalidArgumentError, match="give weights for all tables of the call or for none"):
        lookup_sparse(server_resource(""), segments, refs, ["sum", "sum"], [tf.constant([1.0])])


def test_short_keys(tmp_path, no_server):
    """supportlonglong false: int32 ids work, and an id beyond 32 bits is refused, not cut."""
    folder = write_table(tmp_path / "t", [-(2**31), 0, 2**31 - 1], [[1.0], [2.0], [3.0]])
    config = write_config(tmp_path / "ps.json", [model_config("short", {"t": (folder, 1)})], long_keys=False)
    hps.Init(ps_config_file=config, global_batch_size=1)
    ref = [TableRef("short", "t", 1)]
    for dtype in (np.int32, np.int64):
        rows = lookup(server_resource(""), [np.array([2**31 - 1, 0, -(2**31)], dtype)], ref)[0]
        np.testing.assert_array_equal(rows, [[3.0], [2.0], [1.0]])
    for key in (2**31, -(2**31) - 1, 2**32):
        message = f"'short', table 't': key {key} at position 1 does not fit in 32 bits.*supportlonglong"
        with pytest.raises(tf.errors.OutOfRangeError, match=message):
            lookup(server_resource(""), [tf.constant([0, key], tf.int64)], ref)
        with pytest.raises(tf.errors.OutOfRangeError, match=message):
            lookup_sparse(server_resource(""), [of_lengths(np.array([0, key]), [2])], ref, ["sum"])


def test_lookup_before_any_init(no_server):
    message = r"no parameter server is initialised in this process; call hps.Init\(.*or give the layer ps_config_file"
    with pytest.raises(tf.errors.FailedPreconditionError, match=message):
        plain([tf.constant([1])], "w7")


def test_lookup_after_shutdown(disk, no_server):
    hps.Init(ps_config_file=disk.config, global_batch_size=1)
    hps.shutdown()
    with pytest.raises(tf.errors.FailedPreconditionError, match="hps.Init"):
        plain([tf.constant([1])], "w7")


def test_init_twice(disk, tmp_path, no_server):
    """The same configuration does nothing, also from another place; another one is an error that names both."""
    assert hps.Init(ps_config_file=disk.config, global_batch_size=4) == "OK"
    again = hps.Init(ps_config_file=disk.config, global_batch_size=4)
    assert again.numpy() == b"OK" and again.shape == () and again.dtype == tf.string
    other = make_tables(tmp_path / "other")
    with pytest.raises(hps.errors.FailedPreconditionError) as error:
        hps.Init(ps_config_file=other.config, global_batch_size=4)
    assert disk.config in str(error.value) and other.config in str(error.value)
    assert "hps.shutdown()" in str(error.value)
    np.testing.assert_array_equal(plain([[3]], "w7")[0], disk.rows["w7"][3:4])  # the first one serves on
    hps.shutdown()
    hps.Init(ps_config_file=other.config, global_batch_size=4)
    np.testing.assert_array_equal(plain([[3]], "w7")[0], other.rows["w7"][3:4])


def test_init_in_a_function(tables):
    assert tf.function(lambda: hps.Init(ps_config_file=tables.config, global_batch_size=1) == "OK")()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ps_config_file": "ps.json"}, TypeError, "needs global_batch_size"),
        ({"global_batch_size": 1}, TypeError, "needs ps_config_file"),
        ({"ps_config_file": "ps.json", "global_batch_size": 0}, ValueError, "at least 1, got 0"),
        ({"ps_config_file": "ps.json", "global_batch_size": 1, "batch": 1}, TypeError, "unexpected.*batch"),
        ({"ps_config_file": "no/ps.json", "global_batch_size": 1}, LookupError, "no configuration file.*no/ps.json"),
    ],
)
def test_init_arguments(no_server, arguments, error, message):
    with pytest.raises(error, match=message):
        hps.Init(**arguments)


def test_handle_that_nobody_bound():
    handle = _native.ops().hierarchical_parameter_server_server_handle(handle="nobody")
    with pytest.raises(tf.errors.FailedPreconditionError, match="'nobody' was not initialised.*HPS_INIT is not 'off'"):
        _native.ops().hierarchical_parameter_server_lookup(server=handle, keys=[tf.constant([1])], tables="main/w7:7")


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_a_cancelled_function_ends_its_lookup(tmp_path, no_server, form):
    """The lookup, which waits for a database for seconds, gives up; it would have counted its rows at its end."""
    from tensorflow.python.eager import cancellation  # has no public name

    count = 400_000
    folder = write_table(tmp_path / "t", np.arange(count), np.zeros((count, 16)))
    config = write_config(
        tmp_path / "ps.json",
        [model_config("slow", {"t": (folder, 16)})],
        volatile_db={"type": "disabled"},
        persistent_db={"type": "rocks_db", "path": str(tmp_path / "database")},
    )
    hps.Init(ps_config_file=config, global_batch_size=1)
    ids = np.random.default_rng(1).permutation(np.tile(np.arange(count), 5))
    splits = np.array([0, len(ids)])
    ref = TableRef("slow", "t", 16)

    @tf.function
    def function(ids):
        if form == "dense":
            return lookup(server_resource(""), [ids], [ref])[0]
        segments = Segments(ids, tf.constant(splits, tf.int64), no_shape(), "row_splits")
        return lookup_sparse(server_resource(""), [segments], [ref], ["sum"])[0]

    def asked():
        line = f'hps_keys_asked_total{{model="slow",table="t"}} {len(ids)}\n'
        return line in hps.servers()[0].prometheus_text()

    manager = cancellation.CancellationManager()
    cancelable = manager.get_cancelable_function(function.get_concrete_function(tf.TensorSpec([None], tf.int64)))

    def cancel():
        deadline = time.monotonic() + 60
        while not asked() and time.monotonic() < deadline:
            time.sleep(0.001)
        manager.start_cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(tf.errors.CancelledError):
        cancelable(tf.constant(ids))
    canceller.join()
    assert asked()
    text = hps.servers()[0].prometheus_text()
    for tier in ("persistent", "default"):
        assert f'hps_rows_served_total{{model="slow",table="t",tier="{tier}"}} 0\n' in text
    keys = tf.constant([1, 2])
    np.testing.assert_array_equal(lookup(server_resource(""), [keys], [ref])[0], np.zeros((2, 16)))
