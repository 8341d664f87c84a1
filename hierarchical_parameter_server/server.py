"""Parameter servers from Python: ``hps.Init`` for TensorFlow scripts, ``hps.ParameterServer`` without TensorFlow."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from . import _native
from .config import InferenceParams, ParameterServerConfig, plain_document


def _model_json(model: dict | InferenceParams | str) -> str:
    if isinstance(model, str):
        return model
    if isinstance(model, InferenceParams):
        model = ParameterServerConfig(inference_params_array=[model]).to_dict()["models"][0]
    if not isinstance(model, dict):
        raise TypeError(f"model must be a dict, JSON text or InferenceParams, not {type(model).__name__}")
    return json.dumps(plain_document(model))


def _keys(keys: Any) -> np.ndarray:
    array = np.asarray(keys)
    # An empty list says nothing about its type, and numpy takes it for floats.
    return array if array.size or isinstance(keys, np.ndarray) else array.astype(np.int64)


def _check_names(model: Any, table: Any = 0) -> None:
    if not isinstance(model, str):
        raise TypeError(f"model must be the name of a model (str), not {type(model).__name__}")
    if isinstance(table, (str, int, np.integer)) and not isinstance(table, (bool, np.bool_)):
        return
    raise TypeError(f"table must be the name of a table (str) or its number (int), not {type(table).__name__}")


class ParameterServer:
    """A parameter server of one's own, independent of TensorFlow and of ``hps.Init``.

    Args:
        config: path of a ps.json file, a dict of the same form (paths and numpy scalars in it are taken as what they
            stand for), or a :class:`ParameterServerConfig`.

    Thread safety: all methods may be called from any thread; lookups release the interpreter lock. Use it as a context
    manager, or call :meth:`close`.

    Raises:
        hps.errors.HpsError: one of its subclasses, naming the model, table, file or configuration key.
    """

    def __init__(self, config: str | os.PathLike | dict | ParameterServerConfig):
        if isinstance(config, (str, os.PathLike)):
            self._server = _native.open_server(os.fspath(config))
        elif isinstance(config, dict):
            self._server = _native.open_server_from_json(json.dumps(plain_document(config)))
        elif isinstance(config, ParameterServerConfig):
            self._server = _native.open_server_from_json(config.to_json())
        else:
            raise TypeError(
                f"config must be the path of a ps.json file, a dict or a ParameterServerConfig, not "
                f"{type(config).__name__}"
            )

    @classmethod
    def _of(cls, server: _native.ParameterServer) -> ParameterServer:
        wrapper = cls.__new__(cls)
        wrapper._server = server
        return wrapper

    def lookup(self, keys: Any, model: str, table: str | int = 0, return_found: bool = False):
        """Looks up rows.

        Args:
            keys: integers of any shape S (a numpy array, or anything that ``numpy.asarray`` takes).
            model: name of the model.
            table: name of the table, or its number in the model.
            return_found: also return which keys a tier held.

        Returns:
            float32 array of shape S + (width,); the row of an unknown key is the table's default value. With
            ``return_found`` a pair of it and a bool array of shape S.
        """
        _check_names(model, table)
        rows, found, _ = self._server.lookup(_keys(keys), model, table)
        return (rows, found) if return_found else rows

    def lookup_report(self, keys: Any, model: str, table: str | int = 0) -> tuple[np.ndarray, dict]:
        """Like :meth:`lookup`, with a dict that says how many rows came from which tier and how long it took."""
        _check_names(model, table)
        rows, _, report = self._server.lookup(_keys(keys), model, table)
        return rows, report

    def load_model(self, model: dict | InferenceParams | str) -> None:
        """Loads one more model: an entry of ``models`` as a dict or JSON text, or :class:`InferenceParams`."""
        self._server.load_model(_model_json(model))

    def replace_model(self, model: dict | InferenceParams | str) -> None:
        """Loads a new version of a model beside the old one, then switches all its tables at once.

        A lookup that runs meanwhile sees the old or the new version, never a mixture. On error the old one serves on.
        The new version has the old one's tables, in the same places and of the same widths; it may have more after
        them.
        """
        self._server.replace_model(_model_json(model))

    def unload_model(self, name: str) -> None:
        """Removes a model and frees its memory. Rows in a persistent database stay there."""
        _check_names(name)
        self._server.unload_model(name)

    @property
    def models(self) -> list[str]:
        """Names of the loaded models."""
        return self._server.model_names()

    def tables(self, model: str) -> list[tuple[str, int]]:
        """(name, width) of each table of a model, in order."""
        _check_names(model)
        return self._server.tables(model)

    def readiness(self) -> dict:
        """Whether the server can answer lookups now, and why not.

        Returns:
            ``ready`` (bool), ``reason`` (a sentence), ``models`` (loaded ones) and ``tiers``: for "volatile" and
            "persistent", as far as configured, ``store``, ``needed`` (lookups fail without it), ``reachable`` and
            ``error``. A tier that is not needed may be unreachable and the server is ready all the same. Each tier is
            asked for one row, for at most a second.
        """
        return self._server.readiness()

    def ready(self) -> bool:
        """True when all models are loaded and every tier that lookups need answers: for readiness probes."""
        return self.readiness()["ready"]

    def stats(self) -> dict:
        """Models, tables, rows and memory per tier, where rows came from, latencies."""
        return json.loads(self._server.stats_json())

    def prometheus_text(self) -> str:
        """The counters and histograms in the text format that Prometheus scrapes."""
        return self._server.prometheus_text()

    def close(self) -> None:
        """Stops the server and frees its memory. Idempotent; later lookups raise FailedPreconditionError."""
        self._server.close()

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def Init(ps_config_file: str | os.PathLike | None = None, global_batch_size: int | None = None, **kwargs):
    """Initialises the process's default parameter server: opens its databases and loads its models.

    Layers that were made without a configuration of their own use it, also SavedModels that were exported with such
    layers. The same configuration again does nothing.

    Args:
        ps_config_file: path of the ps.json file.
        global_batch_size: samples in a batch over all replicas; checked, kept for compatibility (it limits nothing).

    Returns:
        A scalar string tensor ``"OK"``.

    Raises:
        TypeError: a missing or unknown argument.
        hps.errors.FailedPreconditionError: the process was initialised with another configuration (both are named).
        hps.errors.HpsError: other subclasses, naming the file, key, model or table.
    """
    if kwargs:
        raise TypeError(
            f"Init() got unexpected arguments {sorted(kwargs)}; it takes ps_config_file and global_batch_size"
        )
    if ps_config_file is None or global_batch_size is None:
        missing = "ps_config_file" if ps_config_file is None else "global_batch_size"
        raise TypeError(f"Init() needs {missing}: hps.Init(ps_config_file='ps.json', global_batch_size=1024)")
    if isinstance(global_batch_size, (str, bytes)) or not hasattr(global_batch_size, "__int__"):
        raise TypeError(f"global_batch_size must be a number of samples, not {type(global_batch_size).__name__}")
    if int(global_batch_size) < 1:
        raise ValueError(f"global_batch_size must be at least 1, got {global_batch_size}")
    import tensorflow as tf

    with tf.init_scope(), tf.device("CPU:0"):
        _native.ops().hierarchical_parameter_server_use_devices()
        _native.init_default_server(os.fspath(ps_config_file))
        return tf.constant("OK")


def readiness() -> dict:
    """Whether every server open in this process can answer lookups now, and why not.

    Returns:
        ``ready`` (bool), ``reason`` (a sentence) and ``servers``: what :meth:`ParameterServer.readiness` says of each,
        the default server first. Not ready before a server is open.
    """
    servers = [server.readiness() for server in _native.open_servers()]
    if not servers:
        return {"ready": False, "reason": "no server is open: call hps.Init or load a model", "servers": []}
    failing = [server["reason"] for server in servers if not server["ready"]]
    remarks = failing or [server["reason"] for server in servers if server["reason"] != "ready"]
    return {"ready": not failing, "reason": "; ".join(remarks) or "ready", "servers": servers}


def ready() -> bool:
    """True when a server is open and every open server is ready, see :func:`readiness`."""
    return readiness()["ready"]


def stats() -> dict:
    """Statistics of every server open in this process: ``{"servers": [...]}``, the default one first."""
    return {"servers": [json.loads(server.stats_json()) for server in _native.open_servers()]}


def prometheus_text() -> str:
    """Counters and histograms of every open server in Prometheus' text format.

    The label ``server`` tells them apart: the hash of the configuration, as in :func:`stats`.
    """
    return _native.prometheus_text()


def servers() -> list[ParameterServer]:
    """Every server open in this process, the one of ``hps.Init`` first.

    Those that layers and SavedModels have opened are among them, so that the models TensorFlow serves can be loaded,
    replaced and unloaded: ``hps.servers()[0].replace_model(...)``. Closing one closes it for its layers, too.
    """
    return [ParameterServer._of(server) for server in _native.open_servers()]


def shutdown() -> None:
    """Closes every server of this process. Layers with a configuration of their own open theirs again when used."""
    _native.shutdown_servers()
