"""Conversion: what it finds, the bytes it writes, the model it leaves, and each refusal.

Everything here holds for both Kerases: the last test runs this file again with TF_USE_LEGACY_KERAS=1.
"""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf

import hierarchical_parameter_server as hps
from hierarchical_parameter_server import cli
from hierarchical_parameter_server.convert.tables import CHUNK_BYTES, Table, legal_name, table_names, write_table

keras = tf.keras
layers = tf.keras.layers
LEGACY = not hasattr(keras, "ops")
SEED = 20261

needs_keras3 = pytest.mark.skipif(LEGACY, reason="a feature of Keras 3")
needs_legacy = pytest.mark.skipif(not LEGACY, reason="a feature of legacy Keras")


@pytest.fixture(autouse=True)
def _clean_servers():
    yield
    hps.shutdown()


@pytest.fixture
def rng():
    print(f"seed {SEED}")
    return np.random.default_rng(SEED)


def randomise(model, rng):
    """Fresh random weights, so that no test passes on zeros or on a constant initialiser."""
    model.set_weights([rng.normal(0.5, 1.0, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


def table_on_disk(table):
    folder = pathlib.Path(table.folder)
    keys = np.fromfile(folder / "key", "<i8")
    rows = np.fromfile(folder / "emb_vector", "<f4").reshape(-1, table.width)
    return keys, rows


def assert_same(expected, actual):
    for a, b in zip(tf.nest.flatten(expected), tf.nest.flatten(actual), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def ranker():
    """A model with all that is common: shared and masked tables, width 1, float ids, nesting, dicts in and out."""
    rng = np.random.default_rng(SEED)
    user = keras.Input((1,), name="user")  # float32, the default
    item = keras.Input((1,), name="item", dtype="int32")
    words = keras.Input((5,), name="words", dtype="int64")
    dense = keras.Input((3,), name="dense")
    shared = layers.Embedding(100, 8, name="shared.ids")
    masked = layers.Embedding(20, 4, mask_zero=True, name="word")
    user_row, item_row, word_rows = shared(user), shared(item), masked(words)
    inner_in = keras.Input((7,))
    inner = keras.Model(inner_in, layers.BatchNormalization()(layers.Dense(4)(inner_in)), name="inner")
    nested_in = keras.Input((1,), dtype="int64")
    nested_row = layers.Flatten()(layers.Embedding(100, 3, name="nested")(nested_in))
    nested = keras.Model(nested_in, layers.Add()([nested_row, layers.Flatten()(layers.Dense(3)(nested_row))]))
    normalization = layers.Normalization(name="normalization")
    normalization.adapt(rng.normal(2.0, 3.0, (50, 3)).astype("f4"))
    sequence = layers.SimpleRNN(3)(word_rows)
    mean = layers.GlobalAveragePooling1D()(word_rows)
    everything = layers.Concatenate()(
        [
            layers.Flatten()(layers.Dot(axes=2)([user_row, item_row])),
            layers.Flatten()(layers.Embedding(100, 1, name="linear")(user)),
            sequence,
            mean,
            layers.Lambda(lambda x: x * 2, name="twice")(normalization(dense)),
            inner(layers.Concatenate()([sequence, mean])),
            nested(item),
        ]
    )
    outputs = {"score": layers.Dense(1, name="score")(everything), "item_row": layers.Reshape((8,))(item_row)}
    model = keras.Model({"user": user, "item": item, "words": words, "dense": dense}, outputs, name="ranker")
    for layer in model.layers:
        if layer is not normalization:
            randomise(layer, rng) if layer.get_weights() else None
    return model


def ranker_batch(rng, rows=33):
    words = rng.integers(1, 20, (rows, 5))
    words[np.arange(5)[None, :] >= rng.integers(1, 6, (rows, 1))] = 0
    return {
        "user": rng.integers(0, 100, (rows, 1)).astype("f4"),
        "item": rng.integers(0, 100, (rows, 1)).astype("i4"),
        "words": words,
        "dense": rng.normal(size=(rows, 3)).astype("f4"),
    }


def small_model(rng, rows=50, width=4, **embedding):
    ids = keras.Input((3,), dtype="int64", name="ids")
    rows_of_ids = layers.Embedding(rows, width, name="ids_table", **embedding)(ids)
    return randomise(keras.Model(ids, layers.Dense(2)(layers.Flatten()(rows_of_ids)), name="small"), rng)


# ---- Keras models ----


def test_functional_model_predicts_the_same(tmp_path, rng, ranker):
    model = ranker
    batch = ranker_batch(rng)
    before = model(batch)
    report = hps.convert(model, tmp_path / "out")
    assert {t.source: (t.rows, t.width) for t in report.tables} == {
        "shared.ids": (100, 8),
        "word": (20, 4),
        "linear": (100, 1),
        "nested": (100, 3),
    }
    assert_same(before, report.dense_model(batch))
    assert set(report.dense_model.input) == set(batch) if not LEGACY else True
    assert not any(type(w) is layers.Embedding for w in report.dense_model.layers)
    sizes = {tuple(w.shape) for w in report.dense_model.weights}
    assert not sizes & {(100, 8), (20, 4), (100, 1), (100, 3)}, "an embedding stayed in the dense model"
    loaded = keras.models.load_model(report.dense_model_file, safe_mode=False)
    assert_same(before, loaded(batch))
    assert_same(before, model(batch))


def test_tables_hold_the_weights(tmp_path, ranker):
    model = ranker
    report = hps.convert(model, tmp_path / "out")
    for table in report.tables:
        layer = next(x for x in model._flatten_layers() if x.name == table.source)
        keys, rows = table_on_disk(table)
        np.testing.assert_array_equal(keys, np.arange(table.rows))
        np.testing.assert_array_equal(rows, np.asarray(layer.embeddings))
        assert table.folder == str(tmp_path / "out" / "ranker" / table.name)
    assert report.tables[[t.source for t in report.tables].index("shared.ids")].name == "shared_ids"


def test_the_original_still_trains(tmp_path, rng):
    model = small_model(rng)
    ids = rng.integers(0, 50, (8, 3))
    report = hps.convert(model, tmp_path / "out")
    before = report.dense_model(ids)
    model.compile("sgd", "mse")
    model.fit(ids, np.ones((8, 2), "f4"), verbose=0)
    assert np.abs(np.asarray(model(ids)) - np.asarray(before)).max() > 0
    assert_same(before, report.dense_model(ids))


def test_the_dense_model_trains(tmp_path, rng):
    report = hps.convert(small_model(rng), tmp_path / "out")
    ids = rng.integers(0, 50, (8, 3))
    before = np.asarray(report.dense_model(ids))
    report.dense_model.compile("sgd", "mse")
    report.dense_model.fit(ids, np.ones((8, 2), "f4"), verbose=0)
    assert np.abs(np.asarray(report.dense_model(ids)) - before).max() > 0


@pytest.mark.parametrize("with_input", [True, False])
def test_sequential_model(tmp_path, rng, with_input):
    first = [keras.Input((6,), dtype="int64")] if with_input else []
    model = keras.Sequential([*first, layers.Embedding(30, 4, mask_zero=True), layers.LSTM(3), layers.Dense(1)])
    ids = rng.integers(0, 30, (9, 6))
    model(ids[:2])
    randomise(model, rng)
    report = hps.convert(model, tmp_path / "out")
    assert_same(model(ids), report.dense_model(ids))
    assert report.dense_model.output_shape[0] is None, "the size of the first batch must not stick"


def test_mask_reaches_the_layers_behind(tmp_path, rng):
    ids = keras.Input((4,), dtype="int64")
    embedding = layers.Embedding(9, 3, mask_zero=True)
    model = randomise(keras.Model(ids, layers.GlobalAveragePooling1D()(embedding(ids))), rng)
    report = hps.convert(model, tmp_path / "out")
    padded, cut = report.dense_model(np.array([[1, 2, 0, 0]])), report.dense_model(np.array([[1, 2, 1, 2]]))
    np.testing.assert_allclose(np.asarray(padded), np.asarray(cut), rtol=1e-6)
    assert_same(model(np.array([[1, 2, 0, 0]])), padded)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_half_precision(tmp_path, rng, policy):
    ids = keras.Input((3,), dtype="int64")
    embedding = layers.Embedding(50, 4, dtype=policy, name="ids_table")
    model = randomise(keras.Model(ids, layers.Flatten()(embedding(ids))), rng)
    report = hps.convert(model, tmp_path / "out")
    batch = rng.integers(0, 50, (5, 3))
    expected, actual = model(batch), report.dense_model(batch)
    assert expected.dtype == actual.dtype
    assert_same(expected, actual)
    _, rows = table_on_disk(report.tables[0])
    np.testing.assert_array_equal(rows, np.asarray(embedding.embeddings).astype("f4"))


def test_float64_needs_consent(tmp_path, rng):
    ids = keras.Input((3,), dtype="int64")
    model = keras.Model(ids, layers.Embedding(50, 4, dtype="float64", name="precise")(ids))
    with pytest.raises(ValueError, match="precise: the values are float64.*narrow_float64"):
        hps.convert(model, tmp_path / "out")
    report = hps.convert(model, tmp_path / "out", narrow_float64=True)
    _, rows = table_on_disk(report.tables[0])
    np.testing.assert_array_equal(rows, np.asarray(model.layers[-1].embeddings).astype("f4"))


def test_rows_with_nan_are_counted_and_kept(tmp_path, rng):
    model = small_model(rng)
    weights = model.get_weights()
    weights[0][[3, 7]] = np.nan
    weights[0][7, 1] = 1.0
    model.set_weights(weights)
    report = hps.convert(model, tmp_path / "out")
    assert report.tables[0].nan_rows == 2
    np.testing.assert_array_equal(table_on_disk(report.tables[0])[1], weights[0])
    assert "2 rows with NaN" in report.summary()


def test_only_selected_embeddings_are_taken(tmp_path, rng, ranker):
    model = ranker
    batch = ranker_batch(rng)
    report = hps.convert(model, tmp_path / "out", variables="^(word|linear)$")
    assert sorted(t.source for t in report.tables) == ["linear", "word"]
    assert sorted(e.source for e in report.not_taken) == ["nested", "shared.ids"]
    assert_same(model(batch), report.dense_model(batch))


def test_sparse_input_becomes_one_sparse_lookup(tmp_path, rng):
    tags = keras.Input((6,), dtype="int64", name="tags")
    mean = layers.GlobalAveragePooling1D(name="mean")(layers.Embedding(30, 5, mask_zero=True, name="tag")(tags))
    model = randomise(keras.Model(tags, layers.Dense(2)(mean), name="tagged"), rng)
    report = hps.convert(model, tmp_path / "out", sparse_inputs=["tags"])
    ids = rng.integers(1, 30, (17, 6))
    ids[np.arange(6)[None, :] >= rng.integers(1, 7, (17, 1))] = 0
    actual = report.dense_model(tf.sparse.from_dense(tf.constant(ids)))
    np.testing.assert_allclose(np.asarray(actual), np.asarray(model(ids)), rtol=0, atol=1e-6)
    empty = tf.SparseTensor(np.zeros((0, 2), "i8"), np.zeros(0, "i8"), [2, 6])
    assert np.isfinite(np.asarray(report.dense_model(empty))).all()
    loaded = keras.models.load_model(report.dense_model_file)
    assert_same(actual, loaded(tf.sparse.from_dense(tf.constant(ids))))


@pytest.mark.parametrize("case", ["unknown input", "two uses", "no mask", "not selected"])
def test_sparse_input_refused(tmp_path, rng, case):
    tags = keras.Input((6,), dtype="int64", name="tags")
    rows = layers.Embedding(30, 5, mask_zero=case != "no mask", name="tag")(tags)
    output = layers.GlobalAveragePooling1D()(rows)
    if case == "two uses":
        output = layers.Concatenate()([output, layers.LSTM(2)(rows)])
    if case == "not selected":
        output = layers.Concatenate()([output, layers.Flatten()(layers.Embedding(9, 2, name="other")(tags))])
    model = keras.Model(tags, output)
    message = "no input 'tag_ids'" if case == "unknown input" else "'tags' must feed one Embedding"
    with pytest.raises(ValueError, match=message):
        hps.convert(model, tmp_path / "out", sparse_inputs=["tag_ids" if case == "unknown input" else "tags"])
    assert not (tmp_path / "out").exists()


# ---- files ----


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_model_file(tmp_path, rng, suffix):
    model = small_model(rng, mask_zero=True)
    model.save(tmp_path / f"my model{suffix}")
    report = hps.convert(tmp_path / f"my model{suffix}", tmp_path / "out")
    assert report.model_name == "my_model"
    ids = rng.integers(0, 50, (5, 3))
    assert_same(model(ids), report.dense_model(ids))


@needs_legacy
def test_legacy_saved_model_is_converted_whole(tmp_path, rng, ranker):
    model = ranker
    model.save(tmp_path / "ranker")
    batch = ranker_batch(rng)
    report = hps.convert(tmp_path / "ranker", tmp_path / "out")
    assert_same(model(batch), report.dense_model(batch))


@needs_keras3
def test_exported_saved_model_gives_tables(tmp_path, ranker):
    model = ranker
    model.export(tmp_path / "ranker", verbose=False)
    report = hps.convert(tmp_path / "ranker", tmp_path / "out")
    assert sorted((t.rows, t.width) for t in report.tables) == [(20, 4), (100, 1), (100, 3), (100, 8)]
    shared = next(t for t in report.tables if t.width == 8)
    np.testing.assert_array_equal(table_on_disk(shared)[1], np.asarray(model.get_layer("shared.ids").embeddings))
    assert report.dense_model is None and "not built yet" in report.dense_note
    assert not any("embeddings" in entry.source for entry in report.not_taken)


class Recommender(tf.Module):
    """A plain module: four ways to gather, one matrix that is only multiplied."""

    def __init__(self, rng):
        super().__init__()

        def variable(rows, width):
            return tf.Variable(rng.normal(size=(rows, width)).astype("f4"))

        self.plain = variable(40, 3)
        self.sparse = variable(41, 3)
        self.looped = variable(42, 3)
        self.chosen = variable(43, 3)
        self.kernel = variable(3, 3)
        self.unused = variable(44, 3)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64), tf.SparseTensorSpec([None, None], tf.int64)])
    def __call__(self, ids, bags):
        total = tf.gather(self.plain, ids) + tf.nn.embedding_lookup_sparse(self.sparse, bags, None, combiner="sum")
        for _ in tf.range(2):
            total += tf.nn.embedding_lookup(self.looped, ids)
        if tf.reduce_sum(total) > 0:
            total += self._choose(ids)
        return total @ self.kernel

    @tf.function
    def _choose(self, ids):
        return tf.gather(tf.identity(self.chosen), ids)


def test_plain_saved_model_gives_gathered_variables(tmp_path, rng):
    module = Recommender(rng)
    tf.saved_model.save(module, str(tmp_path / "module"))
    report = hps.convert(tmp_path / "module", tmp_path / "out")
    assert sorted(t.name for t in report.tables) == ["chosen", "looped", "plain", "sparse"]
    for table in report.tables:
        np.testing.assert_array_equal(table_on_disk(table)[1], getattr(module, table.name).numpy())
    reasons = {e.source: e.reason for e in report.not_taken}
    assert reasons["kernel"] == reasons["unused"] == "no function gathers rows from it"
    forced = hps.convert(tmp_path / "module", tmp_path / "forced", variables="^(plain|unused)$")
    assert sorted(t.name for t in forced.tables) == ["plain", "unused"]


def test_tensorflow1_saved_model(tmp_path, rng):
    values = rng.normal(size=(25, 4)).astype("f4")
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        table = v1.get_variable("scope/items", initializer=values, use_resource=True)
        v1.get_variable("kernel", [4, 4])
        ids = v1.placeholder(tf.int64, [None])
        rows = tf.nn.embedding_lookup(table, ids)
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, str(tmp_path / "v1"), {"ids": ids}, {"rows": rows})
    report = hps.convert(tmp_path / "v1", tmp_path / "out")
    assert [t.name for t in report.tables] == ["scope_items"]
    np.testing.assert_array_equal(table_on_disk(report.tables[0])[1], values)


def test_checkpoint(tmp_path, rng):
    module = tf.Module()
    module.user_embedding = tf.Variable(rng.normal(size=(30, 4)).astype("f4"))
    module.half_embedding = tf.Variable(tf.cast(rng.normal(size=(31, 4)), tf.bfloat16))
    module.embedding_bias = tf.Variable(np.zeros(4, "f4"))
    module.embedded_ids = tf.Variable(np.zeros((3, 4), "i4"))
    module.kernel = tf.Variable(np.zeros((4, 4), "f4"))
    prefix = tf.train.Checkpoint(model=module).save(str(tmp_path / "ckpt" / "step"))
    report = hps.convert(prefix, tmp_path / "out")
    assert sorted(t.source for t in report.tables) == ["model/half_embedding", "model/user_embedding"]
    by_name = {t.name: t for t in report.tables}
    np.testing.assert_array_equal(table_on_disk(by_name["model_user_embedding"])[1], module.user_embedding.numpy())
    np.testing.assert_array_equal(
        table_on_disk(by_name["model_half_embedding"])[1], module.half_embedding.numpy().astype("f4")
    )
    assert report.dense_model is None and report.dense_model_file is None
    reasons = {e.source: e.reason for e in report.not_taken}
    assert reasons["model/embedding_bias"] == "shape has 1 dimensions, a table has 2"
    assert reasons["model/embedded_ids"] == "values are not floating point"
    assert "embed" in reasons["model/kernel"]
    from_folder = hps.convert(tmp_path / "ckpt", tmp_path / "folder", variables="kernel$")
    assert [t.source for t in from_folder.tables] == ["model/kernel"]


def test_optimizer_state_is_no_table(tmp_path, rng):
    model = small_model(rng)
    optimizer = keras.optimizers.Adam()
    model.compile(optimizer, "mse")
    model.fit(rng.integers(0, 50, (4, 3)), np.ones((4, 2), "f4"), verbose=0)
    prefix = tf.train.Checkpoint(model=model, optimizer=optimizer).save(str(tmp_path / "step"))
    assert [t.rows for t in hps.convert(prefix, tmp_path / "out").tables] == [50]


# ---- the output ----


def test_config_serves_as_it_is(tmp_path, rng, monkeypatch, ranker):
    model = ranker
    report = hps.convert(model, tmp_path / "out", "served", persistent_db="rocks_db")
    monkeypatch.chdir("/")
    with hps.ParameterServer(report.ps_config_file) as server:
        for number, table in enumerate(report.tables):
            keys = rng.integers(0, table.rows, 64)
            rows = table_on_disk(table)[1]
            np.testing.assert_array_equal(server.lookup(keys, "served", table.name), rows[keys])
            np.testing.assert_array_equal(server.lookup(keys, "served", number), rows[keys])
            assert not server.lookup(np.array([table.rows]), "served", table.name).any()


def test_relative_paths_survive_a_move(tmp_path, rng, monkeypatch):
    report = hps.convert(small_model(rng), tmp_path / "out", relative_paths=True, persistent_db="rocks_db")
    rows = table_on_disk(report.tables[0])[1]
    shutil.move(tmp_path / "out", tmp_path / "moved")
    monkeypatch.chdir("/")
    with hps.ParameterServer(tmp_path / "moved" / "ps.json") as server:
        np.testing.assert_array_equal(server.lookup(np.arange(50), "small", "ids_table"), rows)
    assert (tmp_path / "moved" / "rocksdb" / "CURRENT").exists()


def test_config_content(tmp_path, ranker):
    report = hps.convert(ranker, tmp_path / "out", max_batch_size=77)
    config = json.loads(pathlib.Path(report.ps_config_file).read_text())
    (model,) = config["models"]
    keys_per_sample = model["maxnum_catfeature_query_per_table_per_sample"]
    per_table = dict(zip(model["embedding_table_names"], keys_per_sample, strict=True))
    assert per_table == {"shared_ids": 2, "word": 5, "linear": 1, "nested": 1}
    assert model["max_batch_size"] == 77 and "persistent_db" not in config
    assert model["sparse_files"] == [t.folder for t in report.tables]
    written = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert [t["name"] for t in written["tables"]] == [t.name for t in report.tables]


def test_names_fit_the_grammar_and_differ():
    names = table_names(["a/b:0", "a.b:0", "A b 0", "", "///", "é", "x" * 300, "x" * 300])
    assert names == ["a_b_0", "a_b_0_2", "A_b_0_3", "table", "table_2", "table_3", "x" * 120, "x" * 118 + "_2"]
    assert legal_name("ok-Name_1", "model") == "ok-Name_1"


def test_names_of_equal_layers_differ(tmp_path, rng):
    ids = keras.Input((1,), dtype="int64")
    one, two = layers.Embedding(5, 2, name="a.b"), layers.Embedding(6, 2, name="a_b")
    model = randomise(keras.Model(ids, layers.Concatenate()([one(ids), two(ids)])), rng)
    report = hps.convert(model, tmp_path / "out")
    assert sorted(t.name for t in report.tables) == ["a_b", "a_b_2"]
    assert_same(model(np.array([[3], [4]])), report.dense_model(np.array([[3], [4]])))


def test_writing_holds_one_chunk_at_a_time(tmp_path):
    rows, width = 3_000_000, 8

    def read(start, stop):
        return np.arange(start * width, stop * width, dtype="f4").reshape(-1, width)

    calls = []
    tracemalloc.start()
    write_table(
        tmp_path / "t", "t", Table("t", rows, width, np.dtype("f4"), read), lambda *progress: calls.append(progress)
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * CHUNK_BYTES < rows * width * 4
    assert (tmp_path / "t" / "emb_vector").stat().st_size == rows * width * 4
    assert (tmp_path / "t" / "key").stat().st_size == rows * 8
    assert calls[-1] == ("t", rows, rows) and len(calls) > 2
    np.testing.assert_array_equal(np.fromfile(tmp_path / "t" / "key", "<i8"), np.arange(rows))


# ---- all or nothing ----


def test_failure_leaves_nothing_behind(tmp_path, rng):
    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        hps.convert(small_model(rng), tmp_path / "sub" / "out", progress=fail)
    assert list((tmp_path / "sub").iterdir()) == []


def test_overwrite(tmp_path, rng):
    model = small_model(rng)
    report = hps.convert(model, tmp_path / "out")
    first = table_on_disk(report.tables[0])[1]
    randomise(model, rng)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        hps.convert(model, tmp_path / "out")

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        hps.convert(model, tmp_path / "out", overwrite=True, progress=fail)
    np.testing.assert_array_equal(table_on_disk(report.tables[0])[1], first)
    second = table_on_disk(hps.convert(model, tmp_path / "out", overwrite=True).tables[0])[1]
    np.testing.assert_array_equal(second, model.get_weights()[0])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_spares_what_no_conversion_wrote(tmp_path, rng):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("home", "file"):
        with pytest.raises(FileExistsError, match="no conversion wrote it"):
            hps.convert(small_model(rng), tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"


def test_empty_folder_is_used(tmp_path, rng):
    (tmp_path / "out").mkdir()
    hps.convert(small_model(rng), tmp_path / "out")
    assert (tmp_path / "out" / "ps.json").exists()


def test_unwritable_output(tmp_path, rng):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        hps.convert(small_model(rng), tmp_path / "file" / "out")
    with pytest.raises(OSError):
        hps.convert(small_model(rng), "/proc/out")


def test_too_small_a_disk_is_seen_before_writing(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    with pytest.raises(OSError, match="the tables need .* MB and .* MB are free"):
        hps.convert(small_model(rng), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_write_error_in_the_middle(tmp_path, rng):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    table = Table("t", 100_000, 8, np.dtype("f4"), lambda start, stop: np.zeros((stop - start, 8), "f4"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError):
            write_table(tmp_path / "t", "t", table, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- refusals ----


def test_not_a_model(tmp_path):
    for wrong in (None, 3, {"a": 1}, np.zeros((3, 3))):
        with pytest.raises(ValueError, match="is not a model: pass a Keras model"):
            hps.convert(wrong, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such model"):
        hps.convert(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    for wrong in ("empty", "text.txt"):
        with pytest.raises(ValueError, match="is not a model: expected"):
            hps.convert(tmp_path / wrong, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.keras", "a.h5", "saved", "ckpt"])
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    if name == "saved":
        path.mkdir()
        (path / "saved_model.pb").write_bytes(b"\xff" * 50)
    elif name == "ckpt":
        (tmp_path / "ckpt.index").write_bytes(b"rubbish" * 20)
    else:
        path.write_bytes(b"rubbish" * 20)
    with pytest.raises(ValueError, match="damaged|not a .keras model|neither a .keras nor an HDF5"):
        hps.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_values_in_a_checkpoint(tmp_path):
    table = tf.Variable(np.ones((1000, 4), "f4"))
    prefix = tf.train.Checkpoint(user_embedding=table).save(str(tmp_path / "step"))
    data = pathlib.Path(prefix + ".data-00000-of-00001")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(OSError, match="user_embedding cannot be read"):
        hps.convert(prefix, tmp_path / "out")
    data.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        hps.convert(prefix, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_file_is_no_model(tmp_path, rng):
    small_model(rng).save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(ValueError, match="holds weights but no model"):
        hps.convert(tmp_path / "w.weights.h5", tmp_path / "out")


def test_no_embeddings(tmp_path, rng):
    x = keras.Input((3,))
    with pytest.raises(ValueError, match="no embeddings found in plain"):
        hps.convert(keras.Model(x, layers.Dense(2)(x), name="plain"), tmp_path / "out")
    with pytest.raises(ValueError, match="(?s)no embeddings found in small.*ids_table.*no match for 'nothing'"):
        hps.convert(small_model(rng), tmp_path / "out", variables="nothing")
    module = tf.Module()
    module.kernel = tf.Variable(np.zeros((4, 4), "f4"))
    tf.saved_model.save(module, str(tmp_path / "module"))
    with pytest.raises(ValueError, match="(?s)no embeddings found in module.*kernel.*no function gathers"):
        hps.convert(tmp_path / "module", tmp_path / "out")
    tf.saved_model.save(tf.Module(), str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="no embeddings found in bare"):
        hps.convert(tmp_path / "bare", tmp_path / "out")


def test_model_without_weights(tmp_path):
    with pytest.raises(ValueError, match="has no weights yet"):
        hps.convert(keras.Sequential([layers.Dense(3), layers.Dense(2)]), tmp_path / "out")


class OwnModel(keras.Model):
    """A subclassed model."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(5, 2)

    def call(self, ids):
        return self.table(ids)


class OwnEmbedding(layers.Embedding):
    """An Embedding whose rows mean something else."""

    def call(self, ids):
        return 2 * super().call(ids)


class Holder(layers.Layer):
    """A layer with an Embedding inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(5, 2, name="hidden")

    def call(self, ids):
        return self.table(ids)


def test_not_built_yet(tmp_path):
    ids = keras.Input((2,), dtype="int64")
    own = OwnModel()
    own(np.zeros((1, 2), "i8"))
    for model, message in (
        (own, "not built yet: converting subclassed models"),
        (keras.Model(ids, OwnEmbedding(5, 2)(ids)), "is a OwnEmbedding, a subclass"),
        (keras.Model(ids, Holder(name="holder")(ids)), "'hidden' lies inside Holder 'holder'"),
        (keras.Model(ids, own(ids)), "lies inside OwnModel"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            hps.convert(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_keras3
def test_quantized_and_lora(tmp_path, rng):
    model = small_model(rng)
    model.get_layer("ids_table").enable_lora(2)
    with pytest.raises(NotImplementedError, match="'ids_table' has LoRA weights"):
        hps.convert(model, tmp_path / "out")
    model = small_model(rng)
    model.quantize("int8")
    with pytest.raises(NotImplementedError, match="'ids_table' is quantized"):
        hps.convert(model, tmp_path / "out")


def test_model_of_the_other_keras(tmp_path):
    other = pytest.importorskip("keras" if LEGACY else "tf_keras")
    x = other.Input((1,))
    with pytest.raises(ValueError, match="TF_USE_LEGACY_KERAS"):
        hps.convert(other.Model(x, other.layers.Embedding(3, 2)(x)), tmp_path / "out")


class Doubler(layers.Layer):
    """A layer that Keras does not know by itself."""

    def call(self, x):
        return 2 * x


def test_own_layers_in_a_file(tmp_path, rng):
    ids = keras.Input((2,), dtype="int64")
    model = randomise(keras.Model(ids, Doubler()(layers.Embedding(5, 2)(ids))), rng)
    model.save(tmp_path / "own.h5")
    with pytest.raises(ValueError, match="cannot load this model.*Doubler.*custom_objects"):
        hps.convert(tmp_path / "own.h5", tmp_path / "out")
    report = hps.convert(tmp_path / "own.h5", tmp_path / "out", custom_objects={"Doubler": Doubler})
    batch = np.array([[1, 4]])
    assert_same(model(batch), report.dense_model(batch))


def test_lambda_in_a_file(tmp_path, rng):
    ids = keras.Input((2,), dtype="int64")
    model = randomise(keras.Model(ids, layers.Lambda(lambda x: x + 1)(layers.Embedding(5, 2)(ids))), rng)
    model.save(tmp_path / "lambda.keras")
    with pytest.raises(ValueError, match="Lambda layers run code.*allow_lambda=True"):
        hps.convert(tmp_path / "lambda.keras", tmp_path / "out")
    report = hps.convert(tmp_path / "lambda.keras", tmp_path / "out", allow_lambda=True)
    assert_same(model(np.array([[1, 4]])), report.dense_model(np.array([[1, 4]])))


def test_bad_arguments(tmp_path, rng):
    model = small_model(rng)
    for arguments, message in (
        ({"model_name": "a b"}, "model_name 'a b' must consist of"),
        ({"model_name": ""}, "model_name '' must consist of"),
        ({"variables": "("}, "no regular expression"),
        ({"persistent_db": "redis"}, "persistent_db is 'redis'; valid: None, 'rocks_db'"),
    ):
        with pytest.raises(ValueError, match=message):
            hps.convert(model, tmp_path / "out", **arguments)
    model.save(tmp_path / "m.keras")
    prefix = tf.train.Checkpoint(table_embedding=tf.Variable(np.zeros((3, 2), "f4"))).save(str(tmp_path / "c"))
    with pytest.raises(ValueError, match="sparse_inputs needs a Keras model"):
        hps.convert(prefix, tmp_path / "out", sparse_inputs=["a"])


# ---- the command line ----


def test_command_line(tmp_path, rng, capsys):
    small_model(rng).save(tmp_path / "m.keras")
    command = ["convert", str(tmp_path / "m.keras"), "-o", str(tmp_path / "out"), "--name", "served", "--rocksdb"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "ids_table" in out and str(tmp_path / "out" / "ps.json") in out
    config = json.loads((tmp_path / "out" / "ps.json").read_text())
    assert config["models"][0]["model"] == "served" and config["persistent_db"]["type"] == "rocks_db"
    assert cli.main(command) == 1
    assert "hps convert: error:" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
    with pytest.raises(SystemExit) as usage, contextlib.redirect_stderr(None):
        cli.main(["convert"])
    assert usage.value.code == 2


def test_command_line_imports_own_layers(tmp_path, capsys):
    (tmp_path / "own_layers.py").write_text(
        "import tensorflow as tf\n"
        "@tf.keras.utils.register_keras_serializable('own')\n"
        "class Tripler(tf.keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return 3 * x\n"
    )
    make = "; ".join(
        (
            "import own_layers, tensorflow as tf",
            "ids = tf.keras.Input((2,), dtype='int64')",
            "rows = tf.keras.layers.Embedding(5, 2)(ids)",
            "tf.keras.Model(ids, own_layers.Tripler()(rows)).save('m.keras')",
        )
    )
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, check=True, capture_output=True)
    hps_command = [sys.executable, "-m", "hps_command", "convert", "m.keras", "-o", "out"]
    assert cli.main(["convert", str(tmp_path / "m.keras"), "-o", str(tmp_path / "out")]) == 1
    assert "--import MODULE" in capsys.readouterr().err
    taken = subprocess.run([*hps_command, "--import", "own_layers"], cwd=tmp_path, capture_output=True, text=True)
    assert taken.returncode == 0 and taken.stderr == "", taken.stderr  # nor what TensorFlow says at its start
    assert (tmp_path / "out" / "dense.keras").exists()


@needs_keras3
def test_all_of_this_under_legacy_keras():
    pytest.importorskip("tf_keras")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
