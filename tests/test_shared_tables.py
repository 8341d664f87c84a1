"""Models that share tables (share_tables), through ps.json: lookups, the report, `hps memory` and `hps inspect`."""

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import model_config, write_config, write_table

import hierarchical_parameter_server as hps
from hierarchical_parameter_server import _native
from hierarchical_parameter_server.cli import main
from hierarchical_parameter_server.memory_plan import memory_plan

KEYS = np.arange(1000)
WIDTH = 16


def rows_of(keys, version):
    return (np.asarray(keys)[:, None] * 1000 + np.arange(WIDTH) + version).astype("f4")


@pytest.fixture
def folder(tmp_path):
    return write_table(tmp_path / "items", KEYS, rows_of(KEYS, 1))


def sharing(name, folder, **more):
    return model_config(name, {"items": (folder, WIDTH)}, share_tables=True, **more)


def test_one_copy_serves_all_models_and_each_has_its_own_counts(tmp_path, folder):
    database = {"type": "rocks_db", "path": str(tmp_path / "database")}
    config = write_config(
        tmp_path / "ps.json",
        [sharing("a", folder), sharing("b", folder, max_batch_size=7), model_config("own", {"items": (folder, WIDTH)})],
        persistent_db=database,
    )
    with hps.ParameterServer(config) as server:
        for model in ("a", "b", "own"):
            np.testing.assert_array_equal(server.lookup(KEYS, model), rows_of(KEYS, 1))
        server.lookup(KEYS[:10], "b")
        stats = server.stats()
        (shared,) = stats["shared_tables"]
        assert shared["models"] == ["a", "b"] and shared["folder"] == folder
        assert shared["table"]["volatile"]["rows"] == shared["table"]["persistent"]["rows"] == 1000
        tables = {model["name"]: model["tables"][0] for model in stats["models"]}
        assert [tables[model]["keys"] for model in ("a", "b", "own")] == [1000, 1010, 1000]
        assert tables["a"]["shared"] == shared["name"] and "rows" not in tables["a"]["volatile"]
        assert tables["own"]["volatile"]["rows"] == 1000 and "shared" not in tables["own"]
        assert 'hps_keys_asked_total{model="b",table="items"} 1010\n' in server.prometheus_text()

        # The folder changes: who is replaced has the new rows, the other one keeps what it has.
        write_table(folder, KEYS, rows_of(KEYS, 2))
        server.replace_model(sharing("a", folder))
        np.testing.assert_array_equal(server.lookup(KEYS, "a"), rows_of(KEYS, 2))
        np.testing.assert_array_equal(server.lookup(KEYS, "b"), rows_of(KEYS, 1))
        server.unload_model("b")
        server.load_model(sharing("b", folder))
        np.testing.assert_array_equal(server.lookup(KEYS, "b"), rows_of(KEYS, 2))
        assert len(server.stats()["shared_tables"]) == 1
        server.unload_model("a")
        np.testing.assert_array_equal(server.lookup(KEYS, "b"), rows_of(KEYS, 2))
        with pytest.raises(hps.errors.InvalidArgumentError, match="model 'c'.*model 'b'.*default_value_for_each_table"):
            server.load_model(sharing("c", folder, default_value_for_each_table=[3.0]))

    # In the database the rows have the folder's name, and `hps inspect` knows it.
    with hps.ParameterServer(write_config(tmp_path / "ps.json", [sharing("z", folder)], persistent_db=database)) as s:
        assert s.stats()["shared_tables"][0]["table"]["load"]["source"] == "persistent"
        np.testing.assert_array_equal(s.lookup(KEYS, "z"), rows_of(KEYS, 2))


def test_inspect_knows_the_tables_by_their_folder(tmp_path, folder, capsys):
    config = write_config(
        tmp_path / "ps.json",
        [sharing("a", folder), sharing("b", folder)],
        persistent_db={"type": "rocks_db", "path": str(tmp_path / "database")},
    )
    hps.ParameterServer(config).close()
    assert main(["inspect", config]) == 0
    text = capsys.readouterr().out
    name = _native.shared_table_name(folder)
    assert re.fullmatch(r"shared-items-[0-9a-f]{16}", name)
    assert text.count(f"{name}/rows: the database holds this folder") == 1
    assert "shared by a/items" in text and "shared by b/items" in text
    assert "not configured" not in text and "not loaded" not in text


def test_caches_that_differ_are_refused_without_a_gpu_and_by_the_tools(tmp_path, folder, capsys):
    differing = [sharing("a", folder, gpucache=True), sharing("b", folder, gpucache=True, gpucacheper=0.7)]
    config = write_config(tmp_path / "ps.json", differing)
    what = r"ps\.json: model 'b' shares the table folder .*items with model 'a' .* gpucacheper is 0.2 there and 0.7 "
    with pytest.raises(hps.errors.InvalidArgumentError, match=what):
        hps.ParameterServer(config)
    with pytest.raises(hps.errors.InvalidArgumentError, match="model 'b' shares .* gpucacheper"):
        hps.ParameterServer(json.loads((tmp_path / "ps.json").read_text()))
    for command in (["inspect", config], ["memory", config], ["memory", config, "--gpu-memory", "1GiB"]):
        assert main(command) == 1
        assert re.search(what, capsys.readouterr().err)
    for other in (sharing("b", folder, gpucache=False), sharing("b", folder, gpucache=True, deployed_device_list=[])):
        hps.ParameterServer(write_config(tmp_path / "ps.json", [differing[0], other])).close()


def test_memory_counts_shared_rows_and_caches_once(tmp_path, folder, capsys):
    def plan_of(share, devices, **more):
        models = [
            model_config(name, {"items": (folder, WIDTH)}, share_tables=share, gpucache=True, deployed_device_list=on)
            for name, on in devices.items()
        ]
        return memory_plan(write_config(tmp_path / "ps.json", models, **more), gpu_memory=1 << 30)

    database = {"type": "rocks_db", "path": str(tmp_path / "database")}
    one = plan_of(True, {"a": [0]}, persistent_db=database)
    assert one.to_dict()["host"]["items"] == plan_of(False, {"a": [0]}, persistent_db=database).host.items
    three = plan_of(True, {"a": [0], "b": [0, 1], "c": []}, persistent_db=database)
    copies = plan_of(False, {"a": [0], "b": [0, 1], "c": []}, persistent_db=database)
    for item in ("tables in the hash map", "RocksDB: filters and indexes of its files"):
        assert 0 < three.host.items[item] == one.host.items[item] == copies.host.items[item] / 3
    assert three.disk.need == one.disk.need == copies.disk.need / 3
    cached, buffers = "cached rows and their index", "buffers of whole batches"
    for device in (0, 1):
        assert three.gpus[device].items[cached] == one.gpus[0].items[cached]
    assert copies.gpus[0].items[cached] == 2 * one.gpus[0].items[cached]
    assert three.gpus[0].items[buffers] == copies.gpus[0].items[buffers] == 2 * one.gpus[0].items[buffers]
    assert [table.counted_with for table in three.tables] == ["", "a/items", "a/items"]
    assert {table.proposal for table in three.tables} == {three.tables[0].proposal}
    assert main(["memory", str(tmp_path / "ps.json"), "--gpu-memory", "1GiB"]) == 0
    plan_of(True, {"a": [0], "b": [0]})
    assert main(["memory", str(tmp_path / "ps.json"), "--gpu-memory", "1GiB"]) == 0
    assert "shared: a/items" in capsys.readouterr().out
    pinned = [
        memory_plan(
            write_config(
                tmp_path / "ps.json",
                [
                    sharing(n, folder, gpucache=True, embedding_cache_type="static", enable_pagelock=True)
                    for n in names
                ],
            ),
            gpu_memory=1 << 30,
        ).host.items["pinned rows of caches, for each GPU its own"]
        for names in ("a", "ab")
    ]
    assert pinned[0] == pinned[1] > 1000 * 4 * WIDTH


def test_the_plan_is_what_a_server_holds(tmp_path, folder):
    config = write_config(tmp_path / "ps.json", [sharing("a", folder), sharing("b", folder)])
    planned = memory_plan(config).host.items["tables in the hash map"]
    with hps.ParameterServer(config) as server:
        held = server.stats()["shared_tables"][0]["table"]["volatile"]["memory_bytes"]
        assert json.dumps(server.stats()).count('"memory_bytes"') == 1
    assert planned == pytest.approx(held, rel=0.1)


def test_inference_params_have_the_key(folder):
    params = hps.InferenceParams(
        model_name="a",
        max_batchsize=8,
        hit_rate_threshold=1.0,
        dense_model_file="",
        sparse_model_files=[folder],
        device_id=0,
        use_gpu_embedding_cache=False,
        cache_size_percentage=1.0,
        i64_input_key=True,
        embedding_vecsize_per_table=[WIDTH],
        maxnum_catfeature_query_per_table_per_sample=[1],
        share_tables=True,
    )
    with hps.ParameterServer(hps.ParameterServerConfig(inference_params_array=[params])) as server:
        assert server.stats()["shared_tables"][0]["models"] == ["a"]


def test_an_exported_model_with_its_tables_still_shares(tmp_path, folder):
    config = write_config(tmp_path / "ps.json", [sharing("a", folder), sharing("b", folder)])
    ids = keras.Input((3,), dtype="int64", name="ids")
    layers = [hps.LookupLayer(name, 0, WIDTH, ps_config_file=config) for name in ("a", "b")]
    hps.export(keras.Model(ids, [layer(ids) for layer in layers]), tmp_path / "saved", include_tables=True)
    hps.shutdown()
    assert len(list((tmp_path / "saved" / "assets.extra").rglob("emb_vector"))) == 1
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    for rows in loaded.serve({"ids": tf.constant([[1, 2, 3]], tf.int64)}).values():
        np.testing.assert_array_equal(rows, [rows_of([1, 2, 3], 1)])
    (server,) = hps.servers()
    (shared,) = server.stats()["shared_tables"]
    assert shared["models"] == ["a", "b"]
    hps.shutdown()
