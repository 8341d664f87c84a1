"""The only place that imports the native module and loads the TensorFlow op libraries.

The libraries lie beside the native module, which in an editable install is not beside this file.
"""

import atexit
import functools
import os

from . import _hps
from ._hps import (  # noqa: F401  (re-exported for the package)
    ParameterServer,
    available_memory_bytes,
    bind_handle,
    cache_writer_bytes,
    capacity_rows,
    config_hash,
    config_json_schema,
    config_reference,
    count_dense_keys,
    default_handle,
    fingerprint_table_folder,
    hash_map_limit_bytes,
    hash_map_table_bytes,
    init_default_server,
    inspect_shared_memory,
    load_config,
    open_server,
    open_server_from_json,
    open_servers,
    parse_config,
    plan_caches,
    prometheus_text,
    release_handle,
    rocksdb_bulk_bytes,
    rocksdb_load_bytes,
    shared_memory_own_bytes,
    shared_table_bytes,
    shared_table_name,
    shutdown_servers,
    whole_table_bytes,
)

TENSORFLOW_MINOR = "2.21"

# Lookups may run on daemon threads until the very end.
atexit.register(_hps.close_at_exit)


def _library(name: str) -> str:
    return os.path.join(os.path.dirname(_hps.__file__), name)


def _load_op_library(name: str):
    import tensorflow as tf

    if not tf.__version__.startswith(TENSORFLOW_MINOR + "."):
        raise ImportError(
            f"hierarchical_parameter_server was built for TensorFlow {TENSORFLOW_MINOR}.x, but {tf.__version__} is "
            f"installed; TensorFlow's C++ interface changes between minor versions: "
            f'pip install "tensorflow~={TENSORFLOW_MINOR}.0"'
        )
    return tf.load_op_library(_library(name))


@functools.cache
def ops():
    """The module of generated op wrappers (hps_lookup, hps_lookup_sparse, ...); registers the ops at the first call."""
    library = _load_op_library("libhps_ops.so")
    # Lookups only read their resource: without this, tf.function would run them one after another.
    from tensorflow.python.framework import auto_control_deps_utils

    for op in ("Lookup", "LookupStacked", "LookupSparse"):
        auto_control_deps_utils.register_read_only_resource_op("HierarchicalParameterServer>" + op)
    return library


def compiled_by_xla() -> bool:
    """Whether the function that is being traced, or one around it, has ``jit_compile=True``."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


@functools.cache
def predecessor_ops():
    """Registers the predecessor's bare op names `Init` and `Lookup`."""
    return _load_op_library("libhps_predecessor_ops.so")
