"""The configuration classes: the JSON that they write, the way back, and agreement with the native table of fields."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

import hierarchical_parameter_server as hps
from hierarchical_parameter_server import _native
from hierarchical_parameter_server import config as config_module

ROOT = pathlib.Path(__file__).parent.parent
CLASSES = (
    hps.InferenceParams,
    hps.VolatileDatabaseParams,
    hps.PersistentDatabaseParams,
    hps.UpdateSourceParams,
)


def model(name="dlrm", **arguments):
    """An InferenceParams of two tables."""
    defaults = {
        "max_batchsize": 1024,
        "i64_input_key": True,
        "sparse_model_files": ["/data/a", "/data/b"],
        "embedding_vecsize_per_table": [16, 32],
        "maxnum_catfeature_query_per_table_per_sample": [2, 26],
    }
    return hps.InferenceParams(model_name=name, **(defaults | arguments))


def server(*models, **arguments):
    return hps.ParameterServerConfig(inference_params_array=list(models) or [model()], **arguments)


# The JSON key of each argument whose name is another one, as the predecessor's users know them.
RENAMED = {
    "model_name": "model",
    "max_batchsize": "max_batch_size",
    "dense_model_file": "dense_file",
    "sparse_model_files": "sparse_files",
    "use_gpu_embedding_cache": "gpucache",
    "cache_size_percentage": "gpucacheper",
    "number_of_worker_buffers_in_pool": "num_of_worker_buffer_in_pool",
    "number_of_refresh_buffers_in_pool": "num_of_refresher_buffer_in_pool",
    "deployed_devices": "deployed_device_list",
    "i64_input_key": "supportlonglong",
    "backend": "type",
}


@pytest.mark.parametrize("kind", CLASSES)
def test_the_mapping_names_every_argument_once(kind):
    arguments = [field.name for field in dataclasses.fields(kind)]
    assert set(config_module.JSON_KEYS[kind]) == set(arguments)
    for argument, (_, key) in config_module.JSON_KEYS[kind].items():
        assert key == RENAMED.get(argument, argument)


def test_the_arguments_reach_every_key_of_the_native_table():
    schema = config_module.json_schema()
    sections = {
        name: schema["properties"][name]["properties"] for name in ("volatile_db", "persistent_db", "update_source")
    }
    sections["models"] = schema["properties"]["models"]["items"]["properties"]
    sections[""] = schema["properties"]
    native = {(section, key) for section, properties in sections.items() for key in properties}
    mapped = {place for mapping in config_module.JSON_KEYS.values() for place in mapping.values()}
    mapped |= {("", "models"), ("", "fuse_embedding_table"), ("", "lookup_timeout_ms"), ("", "$schema")}  # its own
    assert mapped == native


@pytest.mark.parametrize("kind", CLASSES)
def test_each_argument_writes_its_key(kind):
    for field in dataclasses.fields(kind):
        section, key = config_module.JSON_KEYS[kind][field.name]
        value = hps.VolatileDatabaseParams(type="redis_cluster") if field.name.endswith(("_db", "_source")) else "value"
        expected = {"type": "redis_cluster"} if value != "value" else "value"
        if field.name in ("persistent_db", "update_source"):
            value = config_module._SECTIONS[field.name](type="redis_cluster")
        if kind is hps.InferenceParams:
            document = hps.ParameterServerConfig(inference_params_array=[kind(**{field.name: value})]).to_dict()
            written = document["models"][0] if section else {k: v for k, v in document.items() if k != "models"}
        else:
            written = kind(**{field.name: value}).to_dict()
        assert written == {key: expected}


def test_what_is_not_given_is_not_written():
    assert hps.ParameterServerConfig().to_dict() == {"models": []}
    assert hps.VolatileDatabaseParams().to_dict() == {}


def test_positional_arguments_come_in_the_order_of_the_predecessor():
    params = hps.InferenceParams("m", 64, 0.9, "dense", ["/t"], 0, True, 0.2, True)
    assert params.to_dict() == {
        "model": "m", "max_batch_size": 64, "hit_rate_threshold": 0.9, "dense_file": "dense", "sparse_files": ["/t"],
        "device_id": 0, "gpucache": True, "gpucacheper": 0.2,
    }  # fmt: skip
    assert params.i64_input_key is True


def test_enumerations_and_strings_are_interchangeable():
    by_enum = hps.VolatileDatabaseParams(
        type=hps.DatabaseType_t.redis_cluster,
        algorithm=hps.DatabaseHashMapAlgorithm_t.phm,
        overflow_policy=hps.DatabaseOverflowPolicy_t.evict_random,
    )
    by_string = hps.VolatileDatabaseParams(type="redis_cluster", algorithm="phm", overflow_policy="evict_random")
    assert by_enum.to_dict() == by_string.to_dict()
    assert by_enum == by_string
    assert hps.DatabaseType_t.RocksDB is hps.DatabaseType_t.rocks_db
    assert hps.UpdateSourceType_t.KafkaMessageQueue is hps.UpdateSourceType_t.kafka_message_queue
    assert hps.EmbeddingCacheType_t.UVM is hps.EmbeddingCacheType_t.uvm


@pytest.mark.parametrize(
    ("enumeration", "write"),
    [
        (hps.DatabaseType_t, lambda value: {"volatile_db": hps.VolatileDatabaseParams(type=value)}),
        (hps.DatabaseHashMapAlgorithm_t, lambda value: {"volatile_db": hps.VolatileDatabaseParams(algorithm=value)}),
        (
            hps.DatabaseOverflowPolicy_t,
            lambda value: {"volatile_db": hps.VolatileDatabaseParams(overflow_policy=value)},
        ),
        (hps.UpdateSourceType_t, lambda value: {"update_source": hps.UpdateSourceParams(type=value)}),
        (hps.EmbeddingCacheType_t, lambda value: {"inference_params_array": [model(embedding_cache_type=value)]}),
    ],
)
def test_the_parser_knows_each_member(enumeration, write):
    for member in enumeration:
        if member is hps.DatabaseType_t.rocks_db:
            arguments = {"persistent_db": hps.PersistentDatabaseParams(type=member)}
        else:
            arguments = write(member)
        hps.ParameterServerConfig(**({"inference_params_array": [model()]} | arguments)).validate()


def test_plain_values_of_other_libraries():
    params = model(
        sparse_model_files=[pathlib.Path("/data/a"), "/data/b"],
        embedding_vecsize_per_table=np.array([16, 32]),
        max_batchsize=np.int64(7),
        cache_size_percentage=np.float64(0.5),
        deployed_devices=range(2),
    )
    canonical = json.loads(server(params).validate())["models"][0]
    assert canonical["sparse_files"] == ["/data/a", "/data/b"]
    assert canonical["embedding_vecsize_per_table"] == [16, 32]
    assert (canonical["max_batch_size"], canonical["gpucacheper"]) == (7, 0.5)
    assert canonical["deployed_device_list"] == [0, 1]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (float("nan"), ValueError, "cache_size_percentage: must be a finite number"),
        (object(), TypeError, "cache_size_percentage: a configuration cannot hold a object"),
        ({"a": 1}, TypeError, "cache_size_percentage: a configuration cannot hold a dict"),
        (b"x", TypeError, "cache_size_percentage: a configuration cannot hold a bytes"),
    ],
)
def test_what_json_cannot_hold(value, error, message):
    with pytest.raises(error, match=message):
        server(model(cache_size_percentage=value)).to_dict()


def test_round_trip():
    config = server(
        model("a", use_gpu_embedding_cache=False, default_value_for_each_table=[0.5, 1.0]),
        model("b"),
        volatile_db=hps.VolatileDatabaseParams(type="hash_map", num_partitions=4, password="hidden"),
        persistent_db=hps.PersistentDatabaseParams(type=hps.DatabaseType_t.rocks_db, path="/db"),
        update_source=hps.UpdateSourceParams(type="null"),
        fuse_embedding_table=False,
    )
    again = hps.ParameterServerConfig.from_json(config.to_json())
    assert again == config
    assert again.to_json() == config.to_json()
    assert hps.ParameterServerConfig.from_json(b"\xef\xbb\xbf" + config.to_json().encode()) == config
    assert again.validate() == config.validate()
    assert "hidden" not in repr(config)
    assert "hidden" not in config.validate()
    assert "hidden" in config.to_json()


def test_canonical_text_reads_back():
    canonical = server().validate()
    assert hps.ParameterServerConfig.from_json(canonical).validate() == canonical


def test_unknown_keys_are_errors_on_the_way_back():
    for document, pointer in [
        ({"models": [], "modles": 1}, "/modles"),
        ({"models": [{"gpucachper": 1}]}, "/models/0/gpucachper"),
        ({"models": [{"i64_input_key": True}]}, "/models/0/i64_input_key"),
        ({"models": [], "persistent_db": {"backend": "rocks_db"}}, "/persistent_db/backend"),
    ]:
        with pytest.raises(ValueError, match=f"^{pointer}: unknown key"):
            hps.ParameterServerConfig.from_dict(document)
    with pytest.raises(ValueError, match="/models: must be a list"):
        hps.ParameterServerConfig.from_dict({"models": {}})
    with pytest.raises(ValueError, match="/models/0: must be an object"):
        hps.ParameterServerConfig.from_dict({"models": [1]})
    with pytest.raises(ValueError, match='/volatile_bd: unknown key; did you mean "volatile_db"'):
        hps.ParameterServerConfig.from_json('{"supportlonglong": true, "models": [], "volatile_bd": {}}')


def test_the_mappings_of_the_predecessor():
    bare = hps.InferenceParams(model_name="m", i64_input_key=False, sparse_model_files=["/a", "/b"])
    config = hps.ParameterServerConfig(
        {"m": ["user", "item"]}, {"m": [4, 8]}, {"m": [1, 2]}, [bare], hps.VolatileDatabaseParams()
    )
    canonical = json.loads(config.validate())
    assert canonical["supportlonglong"] is False
    assert canonical["models"][0]["embedding_table_names"] == ["user", "item"]
    assert canonical["models"][0]["embedding_vecsize_per_table"] == [4, 8]
    assert canonical["models"][0]["maxnum_catfeature_query_per_table_per_sample"] == [1, 2]
    with pytest.raises(ValueError, match='emb_table_name: there is no model "other"'):
        hps.ParameterServerConfig(emb_table_name={"other": ["a"]}, inference_params_array=[bare]).to_dict()
    with pytest.raises(ValueError, match="embedding_vec_size.*write it once"):
        server(model(), embedding_vec_size={"dlrm": [4, 8]}).to_dict()
    server(model(), embedding_vec_size={"dlrm": [16, 32]}).validate()


def test_databases_given_with_the_models():
    memory = hps.VolatileDatabaseParams(type="hash_map", num_partitions=3)
    config = server(model("a", volatile_db=memory), model("b", volatile_db=dataclasses.replace(memory)), model("c"))
    assert json.loads(config.validate())["volatile_db"]["num_partitions"] == 3
    other = hps.VolatileDatabaseParams(type="hash_map", num_partitions=4)
    for disagreeing in (
        server(model("a", volatile_db=memory), model("b", volatile_db=other)),
        server(model("a", volatile_db=memory), volatile_db=other),
    ):
        with pytest.raises(ValueError, match='another value of "volatile_db" was given'):
            disagreeing.to_dict()
    with pytest.raises(ValueError, match=r'inference_params_array\[1\]: another value of "supportlonglong"'):
        server(model("a"), model("b", i64_input_key=False)).to_dict()


def test_backend_is_another_name_of_type():
    assert hps.PersistentDatabaseParams(backend="rocks_db").to_dict() == {"type": "rocks_db"}
    assert hps.PersistentDatabaseParams(type="rocks_db", backend="rocks_db").to_dict() == {"type": "rocks_db"}
    with pytest.raises(ValueError, match='another value of "type"'):
        hps.PersistentDatabaseParams(type="disabled", backend="rocks_db").to_dict()


def test_models_must_be_inference_params():
    with pytest.raises(TypeError, match=r"inference_params_array\[0\]: must be InferenceParams, got dict"):
        hps.ParameterServerConfig(inference_params_array=[{"model": "m"}]).to_dict()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hps.ParameterServerConfig(), "/models: is empty|supportlonglong"),
        (server(model(i64_input_key=None)), 'the required key "supportlonglong" is missing'),
        (server(model(cache_size_percentage=1.5)), "/models/0/gpucacheper: must be a number >= 0 and <= 1, got 1.5"),
        (server(model(sparse_model_files=["/a"])), '"sparse_files" names 1 tables'),
        (server(model("a"), model("a")), '/models/1/model: the name "a" is taken'),
        (server(volatile_db=hps.VolatileDatabaseParams(type="redis_claster")), "/volatile_db/type: must be one of"),
        (server(model(max_batchsize=True)), "/models/0/max_batch_size: must be an integer"),
    ],
)
def test_refusals_of_the_native_parser_are_value_errors(config, message):
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_files(tmp_path):
    with pytest.raises(hps.errors.NotFoundError, match="none.json"):
        _native.load_config(str(tmp_path / "none.json"))
    path = tmp_path / "ps.json"
    path.write_text(server(model(sparse_model_files=["a", "b"])).to_json())
    with pytest.raises(hps.errors.NotFoundError, match="/models/0/sparse_files/0: no such file or folder: neither"):
        _native.load_config(str(path))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    loaded = json.loads(_native.load_config(str(path)))
    assert loaded["models"][0]["sparse_files"] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_what_is_not_built_is_refused_by_the_server():
    config = server(update_source=hps.UpdateSourceParams(type=hps.UpdateSourceType_t.kafka_message_queue))
    config.validate()
    with pytest.raises(NotImplementedError, match="/update_source/type: not built yet: kafka_message_queue"):
        hps.ParameterServer(config)


def test_the_reference_page_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text() == _native.config_reference()
