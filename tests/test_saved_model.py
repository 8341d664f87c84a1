"""SavedModels with HPS layers: what they carry, how they come up in a fresh process, and when they let go.

One process loads every SavedModel that the tests need loaded elsewhere (fixture `fresh`); each test looks at its part.
Everything here holds for both Kerases: test_legacy_keras.py runs this file with TF_USE_LEGACY_KERAS=1.
"""

import gc
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_tables, model_config, run_python, write_config

import hierarchical_parameter_server as hps

keras = tf.keras
LEGACY = not hasattr(keras, "ops")
IDS = np.array([[1, 2, 3], [0, 7, 499]])
needs_keras3 = pytest.mark.skipif(LEGACY, reason="a feature of Keras 3")
needs_legacy = pytest.mark.skipif(not LEGACY, reason="a feature of legacy Keras")


def dense_model(tables, config=""):
    """ids [n, 3] -> rows [n, 21], through a Dense layer that changes nothing, so that there are variables."""
    ids = keras.Input((3,), dtype="int64", name="ids")
    rows = hps.LookupLayer("main", 1, 7, ps_config_file=config)(ids)
    flat = keras.layers.Reshape((21,))(rows)
    same = keras.layers.Dense(21, use_bias=False, kernel_initializer="identity", name="same")(flat)
    return keras.Model(ids, same)


def dense_answer(tables):
    return tables.rows["w7"][IDS].reshape(2, 21)


def sparse_model(tables, config=""):
    """A sparse, a weighted sparse, a ragged and a dense input."""
    sparse = keras.Input((9,), dtype="int64", sparse=True, name="sparse")
    weights = keras.Input((9,), sparse=True, name="weights")
    ragged = keras.Input((None,), dtype="int64", ragged=True, name="ragged")
    dense = keras.Input((3,), dtype="int64", name="dense")
    pool = hps.SparseLookupLayer("main", 2, 16, ps_config_file=config)
    outputs = [pool(sparse), pool(sparse, weights, combiner="sum"), pool(ragged, combiner="sqrtn"), pool(dense)]
    named = [keras.layers.Activation("linear", name=f"pooled_{i}")(output) for i, output in enumerate(outputs)]
    return keras.Model([sparse, weights, ragged, dense], named)


def sparse_inputs():
    sparse = tf.SparseTensor([[0, 0], [0, 5], [2, 1]], tf.constant([3, 4, 5], tf.int64), [4, 9])
    return {
        "sparse": sparse,
        "weights": sparse.with_values(tf.constant([0.5, 2.0, 1.0])),
        "ragged": tf.RaggedTensor.from_row_lengths(tf.constant([1, 2, 3], tf.int64), [0, 2, 1, 0]),
        "dense": tf.constant(np.arange(12).reshape(4, 3)),
    }


def function_module(tables, config="", width=7):
    """A tf.Module with a function, for tf.saved_model.save."""
    module = tf.Module()
    module.layer = hps.LookupLayer("main", 1, width, ps_config_file=config)
    module.serve = tf.function(
        lambda ids: {"rows": module.layer(ids)}, input_signature=[tf.TensorSpec([None, 3], tf.int64, "ids")]
    )
    return module


def save_function(tables, path, config=""):
    module = function_module(tables, config)
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    return str(path)


def assets(path):
    return sorted((pathlib.Path(path) / "assets").glob("*"))


# ---- loaded by one fresh process ----


FRESH = """
    import json, os, pathlib, sys, traceback
    import numpy as np, tensorflow as tf
    import hierarchical_parameter_server as hps

    folder = pathlib.Path(sys.argv[1])
    ids = tf.constant(json.loads(sys.argv[2]), tf.int64)
    results = {}

    def attempt(name, body):
        try:
            results[name] = body()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"

    def rows_of(path, run=lambda model: model.serve(ids), keep=[]):
        model = tf.saved_model.load(str(path))
        servers = len(hps.stats()["servers"])
        output = run(model)
        output = next(iter(output.values())) if isinstance(output, dict) else output
        return {"rows": output.numpy().tolist(), "servers": servers}

    def flat(model):
        output = model.signatures["serving_default"](ids=ids)
        return next(iter(output.values()))

    attempt("function", lambda: rows_of(folder / "function"))
    attempt("signature", lambda: rows_of(folder / "function", flat))
    attempt("helper", lambda: rows_of(folder / "helper", flat))
    attempt("moved", lambda: rows_of(folder / "moved", flat))
    attempt("keras", lambda: rows_of(folder / "keras", flat))
    if hasattr(tf.keras.layers, "TFSMLayer"):
        attempt("tfsm", lambda: {"rows": next(iter(
            tf.keras.layers.TFSMLayer(str(folder / "helper"), call_endpoint="serving_default")(ids).values()
        )).numpy().tolist()})
    if (folder / "keras_model").exists():
        attempt("legacy", lambda: {"rows": tf.keras.models.load_model(folder / "keras_model")(ids).numpy().tolist()})

    def sparse():
        model = tf.saved_model.load(str(folder / "sparse"))
        inputs = np.load(folder / "sparse.npz")
        outputs = model.signatures["serving_default"](**{name: tf.constant(inputs[name]) for name in inputs})
        return [outputs[name].numpy().tolist() for name in sorted(outputs)]
    attempt("sparse", sparse)

    def lazy():
        model = tf.saved_model.load(str(folder / "lazy"))
        try:
            model.serve(ids)
            before = "served"
        except tf.errors.FailedPreconditionError as error:
            before = str(error)
        hps.Init(ps_config_file=str(folder / "other" / "ps.json"), global_batch_size=2)
        return {"before": before, "rows": model.serve(ids)["rows"].numpy().tolist()}
    hps.shutdown()
    attempt("lazy", lazy)
    hps.shutdown()

    def session():
        with tf.compat.v1.Session(graph=tf.Graph()) as session:
            meta = tf.compat.v1.saved_model.load(session, ["serve"], str(folder / "function"))
            signature = meta.signature_def["serving_default"]
            fetch = next(iter(signature.outputs.values())).name
            feed = signature.inputs["ids"].name
            rows = [session.run(fetch, {feed: ids.numpy()}) for _ in range(2)]
            rows.append(session.run([fetch, feed], {feed: ids.numpy()})[0])
            open_inside = len(hps.stats()["servers"])
        return {"rows": rows[0].tolist(), "same": all((r == rows[0]).all() for r in rows), "inside": open_inside}
    attempt("session", session)

    (folder / "fresh.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def fresh(disk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    other = make_tables(folder / "other", seed=11)
    hps.shutdown()
    save_function(disk, folder / "function", disk.config)
    save_function(disk, folder / "lazy")  # no server, no configuration
    hps.export(dense_model(disk, disk.config), folder / "helper")
    model = sparse_model(disk, disk.config)
    hps.export(model, folder / "sparse")
    inputs = sparse_inputs()
    expected = [output.numpy() for output in model(list(inputs.values()))]
    flat = {f"{name}_{part}": getattr(inputs[name], part) for name in ("sparse", "weights") for part in PARTS}
    flat.update(ragged_values=inputs["ragged"].values, ragged_row_splits=inputs["ragged"].row_splits)
    np.savez(folder / "sparse.npz", dense=inputs["dense"], **flat)
    if LEGACY:
        dense_model(disk, disk.config).save(folder / "keras", save_format="tf")
        gone = shutil.copy(disk.config, folder / "gone.json")
        dense_model(disk, str(gone)).save(folder / "keras_model", save_format="tf")
        os.remove(gone)  # the layers are made anew with this path
    else:
        dense_model(disk, disk.config).export(folder / "keras", verbose=False)
    # Tables inside; the originals and the place of the export are gone when it is loaded.
    own = make_tables(folder / "own", seed=12)
    hps.export(dense_model(own, own.config), folder / "before", include_tables=True)
    hps.shutdown()
    (folder / "before").rename(folder / "moved")
    shutil.rmtree(folder / "own")
    gc.collect()
    work = tmp_path_factory.mktemp("work")
    run_python(FRESH, folder, json.dumps(IDS.tolist()), cwd=work)
    results = json.loads((folder / "fresh.json").read_text())
    results.update(other=other, own=own, sparse_expected=expected, folder=folder)
    return results


PARTS = ("indices", "values", "dense_shape")


@pytest.mark.parametrize("name", ["function", "signature", "helper", "keras"])
def test_serves_in_a_fresh_process(fresh, disk, name):
    """It opens its server while it is loaded, from the configuration that it carries."""
    assert not isinstance(fresh[name], str), fresh[name]
    np.testing.assert_allclose(np.reshape(fresh[name]["rows"], (2, 21)), dense_answer(disk), rtol=1e-6)
    assert fresh[name]["servers"] == 1


def test_tables_that_travel_along(fresh):
    assert not isinstance(fresh["moved"], str), fresh["moved"]
    np.testing.assert_allclose(fresh["moved"]["rows"], dense_answer(fresh["own"]), rtol=1e-6)


def test_sparse_and_ragged_inputs(fresh):
    assert not isinstance(fresh["sparse"], str), fresh["sparse"]
    for actual, expected in zip(fresh["sparse"], fresh["sparse_expected"], strict=True):
        np.testing.assert_array_equal(np.array(actual, "f4"), expected)


def test_without_a_configuration_uses_the_server_of_the_process(fresh):
    assert not isinstance(fresh["lazy"], str), fresh["lazy"]
    assert "hps.Init" in fresh["lazy"]["before"]
    np.testing.assert_array_equal(np.array(fresh["lazy"]["rows"], "f4"), fresh["other"].rows["w7"][IDS])


def test_in_a_session(fresh, disk):
    """The way of TensorFlow 1, of the C interface and of serving hosts."""
    assert not isinstance(fresh["session"], str), fresh["session"]
    np.testing.assert_array_equal(np.array(fresh["session"]["rows"], "f4"), disk.rows["w7"][IDS])
    assert fresh["session"]["same"] and fresh["session"]["inside"] == 1


@needs_keras3
def test_as_a_layer_of_keras(fresh, disk):
    assert not isinstance(fresh["tfsm"], str), fresh["tfsm"]
    np.testing.assert_allclose(fresh["tfsm"]["rows"], dense_answer(disk), rtol=1e-6)


@needs_legacy
def test_as_a_legacy_keras_model(fresh, disk):
    assert not isinstance(fresh["legacy"], str), fresh["legacy"]
    np.testing.assert_allclose(fresh["legacy"]["rows"], dense_answer(disk), rtol=1e-6)


# ---- loaded without us ----


OUTSIDE = """
    import json, os, sys
    import numpy as np, tensorflow as tf
    path, other, ids = sys.argv[1], sys.argv[2], tf.constant(json.loads(sys.argv[3]), tf.int64)
    try:
        tf.saved_model.load(path)
        print("loaded")
    except Exception as error:
        print("WITHOUT", str(error).replace(chr(10), " "))
    import hierarchical_parameter_server as hps
    os.environ["HPS_INIT"] = "off"
    model = tf.saved_model.load(path)
    assert hps.stats()["servers"] == []
    try:
        model.serve(ids)
    except tf.errors.FailedPreconditionError as error:
        print("OFF", str(error).replace(chr(10), " "))
    print("SIGNATURES", list(model.signatures))
"""


def test_without_the_package_and_with_init_off(fresh, tmp_path):
    """The message names the package; with HPS_INIT=off a SavedModel can be looked at, and nothing is opened."""
    output = run_python(OUTSIDE, fresh["folder"] / "function", "", json.dumps(IDS.tolist()), cwd=tmp_path).stdout
    lines = {line.split(" ")[0]: line for line in output.splitlines()}
    assert "HierarchicalParameterServer" in lines["WITHOUT"] and "loaded" not in lines
    assert "HPS_INIT" in lines["OFF"]
    assert "serving_default" in lines["SIGNATURES"]


# ---- what a SavedModel carries ----


def test_the_configuration_is_made_portable(disk, tmp_path, no_server, monkeypatch):
    """Relative paths become absolute, the password stays behind, everything else is as its author wrote it."""
    config = json.loads(pathlib.Path(disk.config).read_text())
    config["models"][0]["sparse_files"] = [os.path.basename(path) for path in config["models"][0]["sparse_files"]]
    config["persistent_db"] = {"type": "rocks_db", "path": "database"}
    config["volatile_db"] = {"type": "hash_map", "password": "a secret", "num_partitions": 2}
    written = disk.folder / "relative.json"
    written.write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    path = save_function(disk, "saved", str(written))
    (asset,) = assets(path)
    text = asset.read_text()
    assert "a secret" not in text and "password" not in text
    carried = json.loads(text)
    assert carried["models"][0]["sparse_files"] == [str(disk.folder / name) for name in disk.names]
    assert carried["persistent_db"]["path"] in (str(disk.folder / "database"), str(tmp_path / "database"))
    assert carried["volatile_db"] == {"type": "hash_map", "num_partitions": 2}
    carried["models"][0].pop("sparse_files")
    config["models"][0].pop("sparse_files")
    assert carried["models"] == config["models"]


def test_no_password_anywhere_in_the_saved_model(disk, tmp_path, no_server):
    config = json.loads(pathlib.Path(disk.config).read_text())
    config["volatile_db"] = {"password": "a secret"}
    (tmp_path / "ps.json").write_text(json.dumps(config))
    path = save_function(disk, tmp_path / "saved", str(tmp_path / "ps.json"))
    for file in pathlib.Path(path).rglob("*"):
        assert file.is_dir() or b"a secret" not in file.read_bytes(), file


def test_no_configuration_no_asset(disk, tmp_path, no_server):
    assert assets(save_function(disk, tmp_path / "saved")) == []


def test_layers_share_one_asset(disk, tmp_path, no_server):
    module = tf.Module()
    module.layers = [hps.LookupLayer("main", i, 7 if i == 1 else 1, ps_config_file=disk.config) for i in (0, 1, 1)]
    module.serve = tf.function(
        lambda ids: [layer(ids) for layer in module.layers], input_signature=[tf.TensorSpec([None], tf.int64)]
    )
    tf.saved_model.save(module, str(tmp_path / "saved"))
    assert len(assets(tmp_path / "saved")) == 1
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    rows = loaded.serve(tf.constant([5], tf.int64))
    np.testing.assert_array_equal(rows[1], disk.rows["w7"][[5]])


def test_two_configurations_in_one_model(disk, tmp_path, no_server):
    other = make_tables(tmp_path / "other", seed=5)
    for include_tables in (False, True):
        ids = keras.Input((3,), dtype="int64", name="ids")
        layers = [
            hps.LookupLayer("main", 1, 7, ps_config_file=t.config, name=name)
            for name, t in zip("ab", (disk, other), strict=True)
        ]
        path = tmp_path / f"saved{include_tables}"
        hps.export(keras.Model(ids, [layer(ids) for layer in layers]), path, include_tables=include_tables)
        hps.shutdown()
        assert len(assets(path)) == 2
        model = tf.saved_model.load(str(path))
        rows = [output for _, output in sorted(model.serve({"ids": tf.constant(IDS)}).items())]
        np.testing.assert_array_equal(rows[0], disk.rows["w7"][IDS])
        np.testing.assert_array_equal(rows[1], other.rows["w7"][IDS])
        del model
        gc.collect()


def test_the_layer_serves_on_after_saving(disk, tmp_path, no_server):
    module = function_module(disk, disk.config)
    for name in ("a", "b"):
        tf.saved_model.save(module, str(tmp_path / name))
        gc.collect()
        np.testing.assert_array_equal(module.serve(IDS)["rows"], disk.rows["w7"][IDS])
    assert len(hps.stats()["servers"]) == 1


def test_a_configuration_that_changed_between_two_exports(disk, tmp_path, no_server):
    config = pathlib.Path(shutil.copy(disk.config, tmp_path / "ps.json"))
    module = function_module(disk, str(config))
    tf.saved_model.save(module, str(tmp_path / "a"))
    changed = json.loads(config.read_text())
    changed["models"][0]["max_batch_size"] = 77
    config.write_text(json.dumps(changed))
    tf.saved_model.save(module, str(tmp_path / "b"))
    sizes = [json.loads(assets(tmp_path / name)[0].read_text())["models"][0]["max_batch_size"] for name in "ab"]
    assert sizes == [4, 77]


def test_saved_again_after_loading(disk, tmp_path, no_server):
    save_function(disk, tmp_path / "first", disk.config)
    model = tf.saved_model.load(str(tmp_path / "first"))
    tf.saved_model.save(model, str(tmp_path / "second"))
    del model
    gc.collect()
    shutil.rmtree(tmp_path / "first")
    again = tf.saved_model.load(str(tmp_path / "second"))
    np.testing.assert_array_equal(again.serve(IDS)["rows"], disk.rows["w7"][IDS])


# ---- coming and going ----


def test_loaded_twice(disk, tmp_path, no_server):
    """Two loads share one server; it lives until the last one is gone."""
    path = save_function(disk, tmp_path / "saved", disk.config)
    gc.collect()
    assert hps.stats()["servers"] == []
    models = [tf.saved_model.load(path) for _ in range(2)]
    assert len(hps.stats()["servers"]) == 1
    for _ in range(2):
        np.testing.assert_array_equal(models[-1].serve(IDS)["rows"], disk.rows["w7"][IDS])
        assert len(hps.stats()["servers"]) == 1
        models.pop()
        gc.collect()
    assert hps.stats()["servers"] == []


def test_two_versions_side_by_side(disk, tmp_path, no_server):
    other = make_tables(tmp_path / "other", seed=3)
    paths = [save_function(t, tmp_path / f"v{i}", t.config) for i, t in enumerate((disk, other))]
    old = tf.saved_model.load(paths[0])
    new = tf.saved_model.load(paths[1])
    assert len(hps.stats()["servers"]) == 2
    np.testing.assert_array_equal(old.serve(IDS)["rows"], disk.rows["w7"][IDS])
    np.testing.assert_array_equal(new.serve(IDS)["rows"], other.rows["w7"][IDS])
    del old
    gc.collect()
    assert len(hps.stats()["servers"]) == 1
    np.testing.assert_array_equal(new.serve(IDS)["rows"], other.rows["w7"][IDS])


def test_loaded_beside_init(disk, tmp_path, no_server):
    """hps.Init with another configuration does not reach SavedModels that carry their own."""
    other = make_tables(tmp_path / "other", seed=3)
    path = save_function(disk, tmp_path / "saved", disk.config)
    hps.Init(ps_config_file=other.config, global_batch_size=1)
    model = tf.saved_model.load(path)
    np.testing.assert_array_equal(model.serve(IDS)["rows"], disk.rows["w7"][IDS])


def test_relative_place_of_a_saved_model(disk, tmp_path, no_server, monkeypatch):
    save_function(disk, tmp_path / "saved", disk.config)
    monkeypatch.chdir(tmp_path)
    model = tf.saved_model.load("saved")
    monkeypatch.chdir("/")
    hps.shutdown()  # so that the next lookup opens the server again
    np.testing.assert_array_equal(model.serve(IDS)["rows"], disk.rows["w7"][IDS])


def test_a_table_that_is_gone_is_found_while_loading(tmp_path, no_server):
    tables = make_tables(tmp_path / "tables")
    path = save_function(tables, tmp_path / "saved", tables.config)
    gc.collect()
    shutil.rmtree(tmp_path / "tables" / "w7")
    with pytest.raises((tf.errors.NotFoundError, FileNotFoundError), match="w7.key: No such file"):
        tf.saved_model.load(path)


# ---- hps.export ----


def test_export_takes_structures_of_inputs(disk, tmp_path, no_server):
    """A dict of inputs goes in by name."""
    a = keras.Input((3,), dtype="int64", name="a")
    b = keras.Input((3,), dtype="int64", name="b")
    layer = hps.LookupLayer("main", 1, 7, ps_config_file=disk.config)
    model = keras.Model({"a": a, "b": b}, keras.layers.Subtract()([layer(a), layer(b)]))
    assert hps.export(model, tmp_path / "saved") == str(tmp_path / "saved")
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    ids = tf.constant(IDS)
    expected = disk.rows["w7"][IDS] - disk.rows["w7"][IDS + 0 * IDS]
    np.testing.assert_array_equal(next(iter(loaded.serve({"a": ids, "b": ids}).values())), expected)
    rows = next(iter(loaded.signatures["serving_default"](a=ids, b=ids * 0).values()))
    np.testing.assert_array_equal(rows, disk.rows["w7"][IDS] - disk.rows["w7"][IDS * 0])


def test_export_of_a_sequential_model_with_trained_weights(disk, tmp_path, no_server):
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="int64", name="ids"),
            hps.LookupLayer("main", 1, 7, ps_config_file=disk.config),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    hps.export(model, tmp_path / "saved")
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    rows = loaded.signatures["serving_default"](ids=tf.constant(IDS))
    np.testing.assert_allclose(next(iter(rows.values())), model(IDS), rtol=1e-6)


def test_export_refusals(disk, tmp_path, no_server):
    model = dense_model(disk, disk.config)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists; choose another folder or give overwrite=True"):
        hps.export(model, tmp_path / "there")
    hps.export(model, tmp_path / "there", overwrite=True)
    assert (tmp_path / "there" / "saved_model.pb").exists()
    with pytest.raises(ValueError, match="no HPS layer of the model has ps_config_file"):
        hps.export(dense_model(disk), tmp_path / "new", include_tables=True)
    with pytest.raises(ValueError, match="the model has no inputs; give a functional model"):
        hps.export(keras.Sequential([hps.LookupLayer("main", 1, 7)]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_export_with_a_configuration_that_is_wrong(disk, tmp_path, no_server):
    config = write_config(tmp_path / "ps.json", [model_config("main", {"w7": (disk.folder / "w7", 7)}, max_batch=1)])
    ids = keras.Input((3,), dtype="int64")
    model = keras.Model(ids, hps.LookupLayer("main", 0, 7, ps_config_file=config)(ids))
    with pytest.raises(ValueError, match="max_batch.*max_batch_size"):
        hps.export(model, tmp_path / "saved")
