"""Keras models: loading them and finding their Embedding layers, in Keras 3 and in legacy Keras (tf_keras)."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from hierarchical_parameter_server.convert.tables import Table

keras = tf.keras
LEGACY = not hasattr(keras, "ops")
_VERSION = keras.__version__ if hasattr(keras, "__version__") else "2 (tf_keras)"


@dataclasses.dataclass(frozen=True)
class Edge:
    """One call of a layer in a functional model; inputs and outputs are symbolic tensors."""

    layer: Any
    inputs: list[Any]
    outputs: list[Any]


def is_keras_object(model: Any) -> bool:
    """Whether `model` is a Keras model of the Keras that TensorFlow uses in this process.

    Raises:
        ValueError: if it is a model of the other Keras.
    """
    if isinstance(model, keras.Model):
        return True
    roots = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    other = "keras" if LEGACY else "tf_keras"
    if other in roots:
        setting = "unset TF_USE_LEGACY_KERAS" if LEGACY else "set TF_USE_LEGACY_KERAS=1 before TensorFlow is imported"
        raise ValueError(f"the model is one of {other}, but tf.keras is Keras {_VERSION} here: {setting}")
    return False


def is_graph_model(layer: Any) -> bool:
    """Whether `layer` is a functional or sequential model whose graph of layers is known."""
    if not isinstance(layer, keras.Model):
        return False
    if type(layer).call not in (keras.Sequential.call, _functional_class().call):
        return False
    if isinstance(layer, keras.Sequential):
        return bool(layer.built and getattr(layer, "_is_graph_network" if LEGACY else "_functional", None))
    return isinstance(layer, _functional_class())


@functools.cache
def _functional_class() -> type:
    probe = keras.Input((1,))
    return type(keras.Model(probe, probe))


def load(path: pathlib.Path, custom_objects: Mapping[str, Any] | None, allow_lambda: bool) -> Any:
    """Loads a .keras or .h5 file or a SavedModel folder as a Keras model, uncompiled.

    Raises:
        ValueError: Keras cannot read it; the message says what to do.
    """
    if path.suffix == ".keras":
        _check_archive(path)
    elif path.is_file():
        _check_h5(path)
    try:
        return keras.models.load_model(
            os.fspath(path), custom_objects=dict(custom_objects or {}), compile=False, safe_mode=not allow_lambda
        )
    except Exception as error:  # Keras raises nearly every type here.
        text = str(error).strip()
        if "ambda" in text and not allow_lambda:
            hint = "Lambda layers run code from the file: if you trust it, pass allow_lambda=True (--allow-lambda)"
        else:
            hint = (
                "if it uses layers or functions of your own, pass custom_objects={'Name': Name} "
                "(command line: --import MODULE, a module that registers them)"
            )
        raise ValueError(f"{path}: Keras {_VERSION} cannot load this model: {_shorten(text)}. Hint: {hint}") from error


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 400 else line[:400] + "..."


def _check_archive(path: pathlib.Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            version = json.loads(archive.read("metadata.json"))["keras_version"]
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a .keras model: {_shorten(str(error))}") from error
    _check_generation(path, version)


def _check_h5(path: pathlib.Path) -> None:
    import h5py

    try:
        with h5py.File(path) as file:
            if "model_config" not in file.attrs:
                raise ValueError(
                    f"{path} holds weights but no model: rebuild the model, load_weights() and pass the model itself"
                )
            version = file.attrs.get("keras_version", _VERSION)
    except OSError as error:
        raise ValueError(f"{path} is neither a .keras nor an HDF5 model: {_shorten(str(error))}") from error
    if LEGACY:
        _check_generation(path, version)


def _check_generation(path: pathlib.Path, version: str) -> None:
    if (int(version.split(".")[0]) < 3) != LEGACY:
        cure = "unset TF_USE_LEGACY_KERAS" if LEGACY else "set TF_USE_LEGACY_KERAS=1"
        raise ValueError(f"{path} was saved by Keras {version}, but tf.keras is {_VERSION} here: {cure}")


def graph(model: Any, name: str | None = None) -> Any:
    """A plain functional model over the layers of a functional or sequential `model`; copies nothing."""
    if isinstance(model, keras.Sequential):
        return keras.Model(model.inputs[0], model.outputs[0], name=name)
    return keras.Model(model.input, model.output, name=name)


def edges(model: Any) -> list[Edge]:
    """All layer calls of a functional model, from the inputs to the outputs."""
    found = []
    nodes_by_depth = graph(model)._nodes_by_depth
    for depth in sorted(nodes_by_depth, reverse=True):
        for node in nodes_by_depth[depth]:
            layer = node.outbound_layer if LEGACY else node.operation
            inputs = node.keras_inputs if LEGACY else node.input_tensors
            is_input = isinstance(layer, keras.layers.InputLayer)
            outputs = tf.nest.flatten(node.outputs)
            found.append(Edge(layer, [] if is_input else list(inputs), outputs))
    return found


def find_embeddings(model: Any, pattern: str | None) -> tuple[dict[Any, Table], list[Any]]:
    """The Embedding layers of a functional or sequential model, nested models included.

    Args:
        pattern: regular expression; only layers whose name contains a match are taken.

    Returns:
        The layers taken, each with its table, and the Embedding layers left alone.

    Raises:
        NotImplementedError: the model, or an embedding in it, is of a kind that is not supported yet.
        ValueError: the model has no weights yet.
    """
    _check_graph_model(model)
    taken: dict[Any, Table] = {}
    left: list[Any] = []
    for layer, keys_per_sample in _walk(model):
        if layer in taken:
            taken[layer] = dataclasses.replace(
                taken[layer], keys_per_sample=taken[layer].keys_per_sample + keys_per_sample
            )
        elif pattern is not None and re.search(pattern, layer.name) is None:
            if layer not in left:
                left.append(layer)
        else:
            taken[layer] = _table(layer, keys_per_sample)
    return taken, left


def _check_graph_model(model: Any) -> None:
    if is_graph_model(model):
        return
    name = f"{type(model).__name__} '{model.name}'"
    if isinstance(model, keras.Sequential) and not model.built:
        raise ValueError(f"{name} has no weights yet: call it once on a batch, or give it an Input")
    raise NotImplementedError(
        f"not built yet: converting subclassed models ({name}). Functional and Sequential models are converted whole; "
        "for this one, save it with model.export() and convert that folder to get its tables"
    )


def _walk(model: Any) -> Iterator[tuple[Any, int]]:
    """Yields each use of an Embedding layer with the number of ids per sample."""
    for edge in edges(model):
        layer = edge.layer
        if isinstance(layer, keras.layers.Embedding):
            _check_embedding(layer)
            shape = edge.inputs[0].shape
            yield layer, math.prod(int(size or 1) for size in list(shape)[1:])
        elif is_graph_model(layer):
            yield from _walk(layer)
        elif isinstance(layer, keras.layers.Layer):
            for inner in layer._flatten_layers(include_self=False):
                if isinstance(inner, keras.layers.Embedding):
                    raise NotImplementedError(
                        f"not built yet: Embedding '{inner.name}' lies inside {type(layer).__name__} '{layer.name}'; "
                        "only embeddings that are layers of a functional or sequential model can be replaced"
                    )


def _check_embedding(layer: Any) -> None:
    what = f"Embedding '{layer.name}'"
    if type(layer) is not keras.layers.Embedding:
        raise NotImplementedError(
            f"not built yet: {what} is a {type(layer).__name__}, a subclass whose meaning is not known here"
        )
    if getattr(layer, "quantization_mode", None):
        raise NotImplementedError(
            f"not built yet: {what} is quantized ({layer.quantization_mode}); convert the model before quantize()"
        )
    if getattr(layer, "lora_enabled", False):
        raise NotImplementedError(
            f"not built yet: {what} has LoRA weights; merge them first: saving the model as .keras stores merged rows, "
            "which a model built without LoRA can load"
        )


def _table(layer: Any, keys_per_sample: int) -> Table:
    variable = layer.embeddings
    rows, width = (int(size) for size in variable.shape)
    value = tf.convert_to_tensor(variable)

    def read(start: int, stop: int) -> np.ndarray:
        return np.asarray(value[start:stop])

    return Table(
        source=layer.name,
        rows=rows,
        width=width,
        dtype=np.dtype(value.dtype.as_numpy_dtype),
        read=read,
        keys_per_sample=keys_per_sample,
    )
