"""The TensorFlow resource through which layers reach a parameter server.

A :class:`ServerResource` without a configuration stands for the server of ``hps.Init``, whichever the process has at
its first lookup. One with a configuration opens the server of that configuration: at the first lookup in the process
that built the layer, and at load in a process that loads a SavedModel, which carries the configuration as an asset.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import uuid
import weakref

import tensorflow as tf

from . import _native

_resources: weakref.WeakValueDictionary[str, ServerResource] = weakref.WeakValueDictionary()
_resources_lock = threading.Lock()


class ServerResource(tf.saved_model.experimental.TrackableResource):
    """Handle of a parameter server, tracked by the layers that use it.

    Args:
        ps_config_file: absolute path of the configuration, or "" for the default server.
    """

    def __init__(self, ps_config_file: str):
        super().__init__()
        self._ps_config_file = ps_config_file
        self._asset = None
        self._asset_folder = None

    @property
    def ps_config_file(self) -> str:
        return self._ps_config_file

    @property
    def handle(self) -> tf.Tensor:
        """The scalar resource tensor, made outside any function that is being traced."""
        if tf.executing_eagerly():
            return self.resource_handle
        with tf.init_scope():
            return self.resource_handle

    def _create_resource(self):
        create = _native.ops().hierarchical_parameter_server_server_handle
        if not self._ps_config_file:
            return create(handle=_native.default_handle)
        if not tf.executing_eagerly():
            return create(handle="")  # part of a SavedModel: each load gets a handle of its own
        name = f"hps_{uuid.uuid4().hex}"
        _native.bind_handle(name, self._ps_config_file)
        # Not in _destroy_resource: saving makes a passing copy of this object, whose end must not close our server.
        weakref.finalize(self, _native.release_handle, name).atexit = False
        return create(handle=name)

    def _initialize(self):
        if self._asset is not None:
            _native.ops().hierarchical_parameter_server_init_server(self.resource_handle, self._asset.asset_path)

    def _destroy_resource(self):
        if self._ps_config_file and not tf.executing_eagerly():  # part of a SavedModel
            tf.raw_ops.DestroyResourceOp(resource=self.resource_handle, ignore_lookup_error=True)

    def _trackable_children(self, save_type="checkpoint", **kwargs):
        if save_type == "savedmodel" and self._ps_config_file:
            if self._asset_folder is None:
                self._asset_folder = tempfile.TemporaryDirectory(prefix="hps_config_")
            path = os.path.join(self._asset_folder.name, "ps.json")
            with open(path, "w", encoding="utf-8") as file:  # anew at each export: the file may have changed
                json.dump(portable_config(self._ps_config_file), file, indent=2)
            if self._asset is None:
                self._asset = self._track_trackable(tf.saved_model.Asset(path), "config_asset")
        return super()._trackable_children(save_type, **kwargs)


def server_resource(ps_config_file: str | os.PathLike | None) -> ServerResource:
    """The resource for a configuration; layers with the same configuration share one."""
    path = os.path.abspath(os.fspath(ps_config_file)) if ps_config_file else ""
    with _resources_lock:
        resource = _resources.get(path)
        if resource is None:
            resource = _resources[path] = ServerResource(path)
        return resource


def portable_config(ps_config_file: str) -> dict:
    """The configuration as its author wrote it, with absolute paths and without its password."""
    resolved = json.loads(_native.load_config(ps_config_file))
    with open(ps_config_file, encoding="utf-8-sig") as file:
        config = json.load(file)
    for model, resolved_model in zip(config["models"], resolved["models"], strict=True):
        model["sparse_files"] = resolved_model["sparse_files"]
    if "path" in config.get("persistent_db", {}):
        config["persistent_db"]["path"] = resolved["persistent_db"]["path"]
    config.get("volatile_db", {}).pop("password", None)
    return config
