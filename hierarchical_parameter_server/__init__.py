"""Hierarchical parameter server: embedding tables far larger than memory, behind two Keras layers.

Importing registers the TensorFlow ops, so that SavedModels with HPS layers load. Where TensorFlow is not installed, or
with the environment variable HPS_TENSORFLOW=off, only the parts that do without it are there: ParameterServer, the
configuration classes and the statistics.
"""

import importlib.metadata as _metadata
import importlib.util as _importlib_util
import os as _os

from . import errors
from .config import (
    DatabaseHashMapAlgorithm_t,
    DatabaseOverflowPolicy_t,
    DatabaseType_t,
    EmbeddingCacheType_t,
    InferenceParams,
    ParameterServerConfig,
    PersistentDatabaseParams,
    UpdateSourceParams,
    UpdateSourceType_t,
    VolatileDatabaseParams,
)
from .inspect import inspect
from .memory_plan import memory_plan
from .server import Init, ParameterServer, prometheus_text, readiness, ready, servers, shutdown, stats

__all__ = [
    "DatabaseHashMapAlgorithm_t",
    "DatabaseOverflowPolicy_t",
    "DatabaseType_t",
    "EmbeddingCacheType_t",
    "InferenceParams",
    "Init",
    "ParameterServer",
    "ParameterServerConfig",
    "PersistentDatabaseParams",
    "UpdateSourceParams",
    "UpdateSourceType_t",
    "VolatileDatabaseParams",
    "__version__",
    "errors",
    "inspect",
    "memory_plan",
    "prometheus_text",
    "readiness",
    "ready",
    "servers",
    "shutdown",
    "stats",
]

__version__ = _metadata.version("hierarchical-parameter-server")

_TENSORFLOW_NAMES = [
    "LookupLayer",
    "MultiLookupLayer",
    "SparseLookupLayer",
    "StackedLookupLayer",
    "convert",
    "enable_predecessor_ops",
    "export",
]

if _os.environ.get("HPS_TENSORFLOW") != "off" and _importlib_util.find_spec("tensorflow") is not None:
    from . import _native
    from .convert import convert
    from .export import export
    from .lookup_layer import LookupLayer
    from .multi_lookup_layer import MultiLookupLayer
    from .predecessor import enable_predecessor_ops
    from .sparse_lookup_layer import SparseLookupLayer
    from .stacked_lookup_layer import StackedLookupLayer

    _native.ops()
    __all__ += _TENSORFLOW_NAMES
else:

    def __getattr__(name):
        if name in _TENSORFLOW_NAMES:
            raise ImportError(
                f"hierarchical_parameter_server.{name} needs TensorFlow: pip install tensorflow, and see that the "
                f"environment variable HPS_TENSORFLOW is not 'off'"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
