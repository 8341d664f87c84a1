"""SavedModels of the predecessor, which hold the bare op names Init and Lookup."""

import json

import numpy as np
import pytest
from conftest import make_tables, run_python

EXPORT = """
    import sys
    import tensorflow as tf
    import hierarchical_parameter_server as hps
    from hierarchical_parameter_server import _native

    hps.enable_predecessor_ops()
    hps.enable_predecessor_ops()  # twice does no harm
    ops = _native.predecessor_ops()
    config = sys.argv[1]

    def init(path):
        return ops.init(
            global_replica_id=0, num_replicas_in_sync=1, visible_devices=[0], ps_config_file=path, global_batch_size=16)

    def lookup(ids, status, table=1, width=7, model="main"):
        rows = ops.lookup(
            values=ids, global_replica_id=0, init_status=status, model_name=model, table_id=table,
            emb_vec_size=width, dtype=tf.float32)
        assert rows.shape.as_list() == [*ids.shape.as_list(), width]
        return rows

    def save(name, body, dtype=tf.int64):
        module = tf.Module()
        module.serve = tf.function(body, input_signature=[tf.TensorSpec([None, 3], dtype)])
        tf.saved_model.save(module, name)

    save("implicit", lambda ids: lookup(ids, init(config)))
    save("narrow", lambda ids: lookup(ids, init(config)), tf.int32)
    save("explicit", lambda ids: lookup(ids, tf.constant("OK")))
    save("empty", lambda ids: lookup(ids, init("")))
    save("wrong_width", lambda ids: lookup(ids, init(config), width=8))
    save("wrong_table", lambda ids: lookup(ids, init(config), table=66))
    save("wrong_model", lambda ids: lookup(ids, init(config), model="nobody"))
    save("wrong_file", lambda ids: lookup(ids, init("nowhere.json")))
    try:
        save("no_width", lambda ids: lookup(ids, tf.constant("OK"), width=0))
    except Exception as error:
        assert "emb_vec_size must be positive, got 0" in str(error), error
    else:
        raise AssertionError("a width of 0 was taken")
"""

LOAD = """
    import json, pathlib, sys
    import tensorflow as tf
    import hierarchical_parameter_server as hps

    folder, config, other, out = sys.argv[1:]
    results = {}
    ids = tf.constant([[1, 2, 3]], tf.int64)

    def attempt(name, path, ids=ids):
        try:
            results[name] = tf.saved_model.load(f"{folder}/{path}").serve(ids).numpy().tolist()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"

    attempt("not enabled", "implicit")
    hps.enable_predecessor_ops()
    attempt("no server", "explicit")
    attempt("no path", "empty")
    attempt("wrong file", "wrong_file")
    attempt("implicit", "implicit")
    attempt("after implicit", "explicit")
    attempt("narrow", "narrow", tf.cast(ids, tf.int32))
    for name in ("wrong_width", "wrong_table", "wrong_model"):
        attempt(name, name)
    hps.shutdown()
    hps.Init(ps_config_file=other, global_batch_size=1)
    attempt("first wins", "implicit")
    attempt("explicit", "explicit")
    attempt("empty", "empty")
    pathlib.Path(out).write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predecessor")
    tables, other = make_tables(folder / "tables"), make_tables(folder / "other", seed=4)
    run_python(EXPORT, tables.config, cwd=folder)
    run_python(LOAD, folder, tables.config, other.config, folder / "results.json", cwd=folder)
    return {**json.loads((folder / "results.json").read_text()), "tables": tables, "other": other}


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("implicit", "tables"),
        ("after implicit", "tables"),
        ("narrow", "tables"),
        ("first wins", "other"),
        ("explicit", "other"),
        ("empty", "other"),
    ],
)
def test_serves(results, name, whose):
    """Its rule: the first initialisation of the process is the one that counts."""
    assert not isinstance(results[name], str), results[name]
    np.testing.assert_array_equal(np.array(results[name], "f4")[0], results[whose].rows["w7"][[1, 2, 3]])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("not enabled", "Error", "Op type not registered"),
        ("no server", "FailedPreconditionError", "hps.Init"),
        ("no path", "FailedPreconditionError", "hps.Init"),
        ("wrong file", "NotFoundError", "nowhere.json"),
        ("wrong_width", "InvalidArgumentError", "have 7 values"),
        ("wrong_table", "InvalidArgumentError", "has no table 66"),
        ("wrong_model", "NotFoundError", "nobody"),
    ],
)
def test_refusals(results, name, error, message):
    """Where it logged an error and returned whatever lay in memory, the lookup fails."""
    text = results[name]
    assert isinstance(text, str) and error in text.split(":")[0] and message in text
