"""The configuration of a parameter server as Python objects, with the names that users of the predecessor know.

The objects only carry what was written: an argument left at None is not part of the JSON, so that every default, limit
and check lives in one place, the native parser (docs/configuration.md). Values are checked by `validate()` and by
whatever opens a server. Enumerations and their strings are interchangeable.

    config = ParameterServerConfig(inference_params_array=[InferenceParams(
        model_name="dlrm", max_batchsize=1024, i64_input_key=True, sparse_model_files=["tables/user"],
        embedding_vecsize_per_table=[16], maxnum_catfeature_query_per_table_per_sample=[1])])
    config.validate()
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import InvalidArgumentError

__all__ = [
    "DatabaseHashMapAlgorithm_t",
    "DatabaseOverflowPolicy_t",
    "DatabaseType_t",
    "EmbeddingCacheType_t",
    "InferenceParams",
    "ParameterServerConfig",
    "PersistentDatabaseParams",
    "UpdateSourceParams",
    "UpdateSourceType_t",
    "VolatileDatabaseParams",
    "json_schema",
]


class DatabaseType_t(str, enum.Enum):  # noqa: N801 (the predecessor's name)
    disabled = Disabled = "disabled"
    hash_map = HashMap = "hash_map"
    parallel_hash_map = ParallelHashMap = "parallel_hash_map"
    multi_process_hash_map = MultiProcessHashMap = "multi_process_hash_map"
    redis_cluster = RedisCluster = "redis_cluster"
    rocks_db = RocksDB = "rocks_db"


class DatabaseHashMapAlgorithm_t(str, enum.Enum):  # noqa: N801
    stl = STL = "stl"
    phm = PHM = "phm"


class DatabaseOverflowPolicy_t(str, enum.Enum):  # noqa: N801
    evict_oldest = EvictOldest = "evict_oldest"
    evict_random = EvictRandom = "evict_random"
    evict_least_used = EvictLeastUsed = "evict_least_used"


class UpdateSourceType_t(str, enum.Enum):  # noqa: N801
    null = Null = "null"
    kafka_message_queue = KafkaMessageQueue = "kafka_message_queue"


class EmbeddingCacheType_t(str, enum.Enum):  # noqa: N801
    dynamic = Dynamic = "dynamic"
    static = Static = "static"
    uvm = UVM = "uvm"
    stochastic = Stochastic = "stochastic"


class _Params:
    def to_dict(self) -> dict[str, Any]:
        """The JSON object that the arguments stand for, holding what was given and nothing else.

        What an InferenceParams says about the server (i64_input_key, databases) is no part of its object.

        Raises:
            ValueError: two names of one key disagree; a number is not finite.
            TypeError: a value that JSON cannot hold.
        """
        return _objects(self, type(self).__name__)[0]


@dataclasses.dataclass
class VolatileDatabaseParams(_Params):
    """The section volatile_db: the tier in memory."""

    type: DatabaseType_t | str | None = None
    algorithm: DatabaseHashMapAlgorithm_t | str | None = None
    num_partitions: int | None = None
    address: str | None = None
    user_name: str | None = None
    password: str | None = dataclasses.field(default=None, repr=False)
    max_get_batch_size: int | None = None
    max_set_batch_size: int | None = None
    overflow_margin: int | None = None
    overflow_policy: DatabaseOverflowPolicy_t | str | None = None
    overflow_resolution_target: float | None = None
    initial_cache_rate: float | None = None
    refresh_time_after_fetch: bool | None = None
    cache_missed_embeddings: bool | None = None
    update_filters: Sequence[str] | None = None
    max_batch_size: int | None = None
    allocation_rate: int | None = None
    shared_memory_size: int | None = None
    shared_memory_name: str | None = None
    shared_memory_auto_remove: bool | None = None
    num_node_connections: int | None = None
    enable_tls: bool | None = None
    tls_ca_certificate: str | None = None
    tls_client_certificate: str | None = None
    tls_client_key: str | None = None
    tls_server_name_identification: str | None = None
    initialize_after_startup: bool | None = None
    password_env: str | None = None
    password_file: str | os.PathLike[str] | None = None
    timeout_ms: int | None = None
    when_unavailable: str | None = None


@dataclasses.dataclass
class PersistentDatabaseParams(_Params):
    """The section persistent_db: the tier on disk. `backend` is another name of `type`."""

    type: DatabaseType_t | str | None = None
    path: str | os.PathLike[str] | None = None
    num_threads: int | None = None
    read_only: bool | None = None
    max_get_batch_size: int | None = None
    max_set_batch_size: int | None = None
    update_filters: Sequence[str] | None = None
    max_batch_size: int | None = None
    initialize_after_startup: bool | None = None
    timeout_ms: int | None = None
    when_unavailable: str | None = None
    backend: DatabaseType_t | str | None = None


@dataclasses.dataclass
class UpdateSourceParams(_Params):
    """The section update_source: where updates of rows come from."""

    type: UpdateSourceType_t | str | None = None
    brokers: str | None = None
    poll_timeout_ms: int | None = None
    max_receive_buffer_size: int | None = None
    max_batch_size: int | None = None
    failure_backoff_ms: int | None = None
    metadata_refresh_interval_ms: int | None = None
    receive_buffer_size: int | None = None
    max_commit_interval: int | None = None


@dataclasses.dataclass
class InferenceParams(_Params):
    """One model, an element of the list models.

    The databases and the kind of keys are the server's. They may be given with a model, as the predecessor has it; all
    models of a server must then agree.
    """

    model_name: str | None = None
    max_batchsize: int | None = None
    hit_rate_threshold: float | None = None
    dense_model_file: str | os.PathLike[str] | None = None
    sparse_model_files: Sequence[str | os.PathLike[str]] | None = None
    device_id: int | None = None
    use_gpu_embedding_cache: bool | None = None
    cache_size_percentage: float | None = None
    i64_input_key: bool | None = None
    use_mixed_precision: bool | None = None
    scaler: float | None = None
    use_algorithm_search: bool | None = None
    use_cuda_graph: bool | None = None
    number_of_worker_buffers_in_pool: int | None = None
    number_of_refresh_buffers_in_pool: int | None = None
    cache_refresh_percentage_per_iteration: float | None = None
    deployed_devices: Sequence[int] | None = None
    default_value_for_each_table: Sequence[float] | None = None
    volatile_db: VolatileDatabaseParams | None = None
    persistent_db: PersistentDatabaseParams | None = None
    update_source: UpdateSourceParams | None = None
    maxnum_des_feature_per_sample: int | None = None
    refresh_delay: float | None = None
    refresh_interval: float | None = None
    maxnum_catfeature_query_per_table_per_sample: Sequence[int] | None = None
    embedding_vecsize_per_table: Sequence[int] | None = None
    embedding_table_names: Sequence[str] | None = None
    network_file: str | os.PathLike[str] | None = None
    label_dim: int | None = None
    slot_num: int | None = None
    thread_pool_size: int | None = None
    use_static_table: bool | None = None
    embedding_cache_type: EmbeddingCacheType_t | str | None = None
    init_ec: bool | None = None
    enable_pagelock: bool | None = None
    fp8_quant: bool | None = None
    use_context_stream: bool | None = None
    fuse_embedding_table: bool | None = None
    use_hctr_cache_implementation: bool | None = None
    freeze_sparse: bool | None = None
    share_tables: bool | None = None


# Every argument and the JSON key that it writes, with the object that the key belongs to: "" is the document.
JSON_KEYS: dict[type, dict[str, tuple[str, str]]] = {}


def _same(section: str, *arguments: str) -> dict[str, tuple[str, str]]:
    return {argument: (section, argument) for argument in arguments}


JSON_KEYS[InferenceParams] = {
    "model_name": ("models", "model"),
    "max_batchsize": ("models", "max_batch_size"),
    "dense_model_file": ("models", "dense_file"),
    "sparse_model_files": ("models", "sparse_files"),
    "use_gpu_embedding_cache": ("models", "gpucache"),
    "cache_size_percentage": ("models", "gpucacheper"),
    "number_of_worker_buffers_in_pool": ("models", "num_of_worker_buffer_in_pool"),
    "number_of_refresh_buffers_in_pool": ("models", "num_of_refresher_buffer_in_pool"),
    "deployed_devices": ("models", "deployed_device_list"),
    "i64_input_key": ("", "supportlonglong"),
    **_same("", "volatile_db", "persistent_db", "update_source"),
    **_same(
        "models",
        "hit_rate_threshold", "device_id", "use_mixed_precision", "scaler", "use_algorithm_search", "use_cuda_graph",
        "cache_refresh_percentage_per_iteration", "default_value_for_each_table", "maxnum_des_feature_per_sample",
        "refresh_delay", "refresh_interval", "maxnum_catfeature_query_per_table_per_sample",
        "embedding_vecsize_per_table", "embedding_table_names", "network_file", "label_dim", "slot_num",
        "thread_pool_size", "use_static_table", "embedding_cache_type", "init_ec", "enable_pagelock", "fp8_quant",
        "use_context_stream", "fuse_embedding_table", "use_hctr_cache_implementation", "freeze_sparse",
        "share_tables",
    ),
}  # fmt: skip
JSON_KEYS[VolatileDatabaseParams] = _same(
    "volatile_db",
    "type", "algorithm", "num_partitions", "address", "user_name", "password", "max_get_batch_size",
    "max_set_batch_size", "overflow_margin", "overflow_policy", "overflow_resolution_target", "initial_cache_rate",
    "refresh_time_after_fetch", "cache_missed_embeddings", "update_filters", "max_batch_size", "allocation_rate",
    "shared_memory_size", "shared_memory_name", "shared_memory_auto_remove", "num_node_connections", "enable_tls",
    "tls_ca_certificate", "tls_client_certificate", "tls_client_key", "tls_server_name_identification",
    "initialize_after_startup", "password_env", "password_file", "timeout_ms", "when_unavailable",
)  # fmt: skip
JSON_KEYS[PersistentDatabaseParams] = {
    "backend": ("persistent_db", "type"),  # before `type`, which is the one that is read back
    **_same("persistent_db", "type", "path", "num_threads", "read_only", "max_get_batch_size", "max_set_batch_size",
            "update_filters", "max_batch_size", "initialize_after_startup", "timeout_ms", "when_unavailable"),
}  # fmt: skip
JSON_KEYS[UpdateSourceParams] = _same(
    "update_source",
    "type", "brokers", "poll_timeout_ms", "max_receive_buffer_size", "max_batch_size", "failure_backoff_ms",
    "metadata_refresh_interval_ms", "receive_buffer_size", "max_commit_interval",
)  # fmt: skip

_SECTIONS = {
    "volatile_db": VolatileDatabaseParams,
    "persistent_db": PersistentDatabaseParams,
    "update_source": UpdateSourceParams,
}


def _plain(value: Any, place: str) -> Any:
    """`value` as plain JSON data; ValueError or TypeError names `place` where there is no such thing."""
    if isinstance(value, tuple(_SECTIONS.values())):
        return _objects(value, place)[0]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # arrays and scalars of numpy
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: must be a finite number, got {value}")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Iterable) and not isinstance(value, (Mapping, bytes)):
        return [_plain(element, f"{place}[{i}]") for i, element in enumerate(value)]
    raise TypeError(f"{place}: a configuration cannot hold a {type(value).__name__}")


def plain_document(value: Any, pointer: str = "") -> Any:
    """A document of dicts and lists as the data that JSON has: paths become strings, and scalars and arrays of numpy
    plain values.

    Raises:
        InvalidArgumentError: a number that is not finite, or a key that is no string; names its place (``/models/0``).
        TypeError: a value that JSON cannot hold; names its place.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidArgumentError(f"{pointer or 'configuration'}: the key {key!r} is no string")
        return {str(key): plain_document(member, f"{pointer}/{key}") for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_document(element, f"{pointer}/{i}") for i, element in enumerate(value)]
    try:
        return _plain(value, pointer or "configuration")
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from None


def _put(target: dict[str, Any], key: str, value: Any, place: str) -> None:
    """Sets a key; ValueError if it is there with another value."""
    if key in target and target[key] != value:
        raise ValueError(f'{place}: another value of "{key}" was given elsewhere; write it once')
    target[key] = value


def _objects(params: _Params, place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The object of `params` and what it adds to the document."""
    own: dict[str, Any] = {}
    document: dict[str, Any] = {}
    for argument, (section, key) in JSON_KEYS[type(params)].items():
        value = getattr(params, argument)
        if value is not None:
            _put(own if section else document, key, _plain(value, f"{place}.{argument}"), f"{place}.{argument}")
    return own, document


def _from_section(kind: type, section: Any, pointer: str) -> Any:
    if not isinstance(section, Mapping):
        raise ValueError(f"{pointer}: must be an object")
    arguments = {key: argument for argument, (owner, key) in JSON_KEYS[kind].items() if owner}
    unknown = [key for key in section if key not in arguments]
    if unknown:
        raise ValueError(f"{pointer}/{unknown[0]}: unknown key")
    return kind(**{arguments[key]: value for key, value in section.items()})


@dataclasses.dataclass
class ParameterServerConfig:
    """A whole ps.json.

    `emb_table_name`, `embedding_vec_size` and `max_feature_num_per_sample_per_emb_table` map a model's name to the list
    for its tables; they say the same as `embedding_table_names`, `embedding_vecsize_per_table` and
    `maxnum_catfeature_query_per_table_per_sample` of the model, and must agree where both are given.
    """

    emb_table_name: Mapping[str, Sequence[str]] | None = None
    embedding_vec_size: Mapping[str, Sequence[int]] | None = None
    max_feature_num_per_sample_per_emb_table: Mapping[str, Sequence[int]] | None = None
    inference_params_array: Sequence[InferenceParams] = ()
    volatile_db: VolatileDatabaseParams | None = None
    persistent_db: PersistentDatabaseParams | None = None
    update_source: UpdateSourceParams | None = None
    fuse_embedding_table: bool | None = None
    lookup_timeout_ms: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The document as plain dicts and lists, holding what was given and nothing else.

        Raises:
            ValueError: models or sections disagree; a number is not finite; a mapping names an unknown model.
            TypeError: a value that JSON cannot hold, or a model that is no InferenceParams.
        """
        document: dict[str, Any] = {}
        models: list[dict[str, Any]] = []
        for name in (*_SECTIONS, *_TOP_LEVEL):
            value = getattr(self, name)
            if value is not None:
                document[name] = _plain(value, name)
        for i, params in enumerate(self.inference_params_array):
            if not isinstance(params, InferenceParams):
                raise TypeError(f"inference_params_array[{i}]: must be InferenceParams, got {type(params).__name__}")
            model, common = _objects(params, f"inference_params_array[{i}]")
            for key, value in common.items():
                _put(document, key, value, f"inference_params_array[{i}]")
            models.append(model)
        for argument, key in _MODEL_MAPPINGS.items():
            for name, values in (getattr(self, argument) or {}).items():
                named = [model for model in models if model.get("model") == name]
                if not named:
                    raise ValueError(f'{argument}: there is no model "{name}" in inference_params_array')
                for model in named:
                    _put(model, key, _plain(values, f"{argument}[{name!r}]"), f"{argument}[{name!r}]")
        document["models"] = models
        return document

    def to_json(self, indent: int | None = 2) -> str:
        """The text of a ps.json (a password included). Raises as `to_dict`; the values are checked by `validate`."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> ParameterServerConfig:
        """The inverse of `to_dict`; keys given through several ways come back by one. ValueError: an unknown key."""
        top = dict(document)
        models = top.pop("models", [])
        if not isinstance(models, list):
            raise ValueError("/models: must be a list of models")
        config = cls(**{name: top.pop(name, None) for name in _TOP_LEVEL})
        for name, kind in _SECTIONS.items():
            if name in top:
                setattr(config, name, _from_section(kind, top.pop(name), f"/{name}"))
        params = [_from_section(InferenceParams, model, f"/models/{i}") for i, model in enumerate(models)]
        for model in params:
            model.i64_input_key = top.get("supportlonglong")
        top.pop("supportlonglong", None)
        top.pop("$schema", None)  # for editors
        if top:
            raise ValueError(f"/{next(iter(top))}: unknown key")
        config.inference_params_array = params
        return config

    @classmethod
    def from_json(cls, text: str | bytes) -> ParameterServerConfig:
        """Checks the text of a ps.json and reads it. Raises what `validate` raises."""
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        _parse(text, "configuration")
        return cls.from_dict(json.loads(text.removeprefix("\ufeff")))

    def validate(self) -> str:
        """Checks everything and returns the canonical text: each key spelt out, sorted, without secrets.

        Raises:
            ValueError: an unknown key, a wrong type, a value out of range, lists that do not match, a missing key.
        """
        return _parse(self.to_json(), "configuration")


_TOP_LEVEL = ("fuse_embedding_table", "lookup_timeout_ms")
_MODEL_MAPPINGS = {
    "emb_table_name": "embedding_table_names",
    "embedding_vec_size": "embedding_vecsize_per_table",
    "max_feature_num_per_sample_per_emb_table": "maxnum_catfeature_query_per_table_per_sample",
}


def _parse(text: str, origin: str) -> str:
    from . import _native  # late: reading and writing configurations needs no native library

    return _native.parse_config(text, origin)


def json_schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of ps.json for editors."""
    from . import _native

    return json.loads(_native.config_json_schema())
