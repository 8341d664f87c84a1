"""The dense remainder: a model with its embeddings replaced by HPS layers.

The graph of layers is rebuilt, every other layer is copied with its weights, and the original is left as it was.
Layers that are shared stay shared, nested models stay nested, and inputs, outputs and layers keep their names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from hierarchical_parameter_server.convert import keras_models

keras = tf.keras


def build(
    model: Any,
    lookup_for: Mapping[Any, Callable[[], Any]],
    mean_lookup_for: Mapping[Any, Callable[[], Any]],
    sparse_inputs: Sequence[str],
) -> Any:
    """Rebuilds `model` without its embeddings.

    Args:
        model: a functional or sequential model.
        lookup_for: for each Embedding layer to replace, a function that makes its replacement.
        mean_lookup_for: the same for a layer that is to be fused with the mean that follows it.
        sparse_inputs: names of inputs that become SparseTensors. Each must feed just one Embedding(mask_zero=True),
            and that one just one GlobalAveragePooling1D.

    Returns:
        The new model, not compiled.

    Raises:
        ValueError: a sparse input that does not exist or is used in another way.
        NotImplementedError: a layer that cannot be copied.
    """
    replacements: dict[int, Callable[[Any], Any]] = {
        id(layer): lambda _, make=make: make() for layer, make in lookup_for.items()
    }
    bypassed: set[int] = set()
    for chain in _mean_chains(model, sparse_inputs):
        make = mean_lookup_for.get(chain.embedding)
        if make is None:
            raise ValueError(f"sparse_inputs: Embedding '{chain.embedding.name}' is not among those to convert")
        replacements[id(chain.embedding)] = lambda _, make=make: make()
        replacements[id(chain.pooling)] = lambda layer: keras.layers.Activation("linear", name=layer.name)
        bypassed.update(id(operation) for operation in (chain.pooling, *chain.mask_operations))
    return _Rebuild(replacements, bypassed, set(sparse_inputs)).model(model)


@dataclasses.dataclass(frozen=True)
class _MeanChain:
    """An embedding, the pooling layer that takes its mean, and (Keras 3) the operations that compute the mask."""

    embedding: Any
    pooling: Any
    mask_operations: list[Any]


def _mean_chains(model: Any, sparse_inputs: Sequence[str]) -> list[_MeanChain]:
    """For each sparse input, the layers that one sparse lookup replaces."""
    if not sparse_inputs:
        return []
    edges = keras_models.edges(model)
    inputs = {edge.layer.name: edge for edge in edges if isinstance(edge.layer, keras.layers.InputLayer)}
    chains = []
    for name in sparse_inputs:
        if name not in inputs:
            raise ValueError(f"sparse_inputs: the model has no input '{name}'; its inputs are {', '.join(inputs)}")
        chain = _mean_chain(model, edges, inputs[name])
        if chain is None:
            raise ValueError(
                f"sparse_inputs: input '{name}' must feed one Embedding(mask_zero=True), and that one must feed one "
                "GlobalAveragePooling1D and nothing else; leave the input dense instead"
            )
        chains.append(chain)
    return chains


def _mean_chain(model: Any, edges: list[keras_models.Edge], start: keras_models.Edge) -> _MeanChain | None:
    outputs = {id(tensor) for tensor in tf.nest.flatten(model.output)}

    def uses(edge: keras_models.Edge) -> list[keras_models.Edge]:
        return [user for user in edges if any(tensor is edge.outputs[0] for tensor in user.inputs)]

    def is_used_once(layer: Any) -> bool:
        return sum(edge.layer is layer for edge in edges) == 1

    embeddings = [edge for edge in uses(start) if _is_masked_embedding(edge.layer)]
    masks = [edge for edge in uses(start) if type(edge.layer).__name__ == "NotEqual"]
    if len(embeddings) != 1 or len(uses(start)) != 1 + len(masks) or not is_used_once(embeddings[0].layer):
        return None
    poolings = uses(embeddings[0])
    if len(poolings) != 1 or not _is_plain_mean(poolings[0].layer) or not is_used_once(poolings[0].layer):
        return None
    if any(uses(mask) != poolings for mask in masks):
        return None
    if any(id(edge.outputs[0]) in outputs for edge in (start, embeddings[0], *masks)):
        return None
    return _MeanChain(embeddings[0].layer, poolings[0].layer, [mask.layer for mask in masks])


def _is_masked_embedding(layer: Any) -> bool:
    return isinstance(layer, keras.layers.Embedding) and layer.mask_zero


def _is_plain_mean(layer: Any) -> bool:
    return (
        type(layer) is keras.layers.GlobalAveragePooling1D
        and layer.data_format == "channels_last"
        and not layer.keepdims
    )


class _Rebuild:
    """One rebuild; remembers each layer's copy so that shared layers stay shared."""

    def __init__(
        self, replacements: Mapping[int, Callable[[Any], Any]], bypassed: set[int], sparse_inputs: set[str]
    ) -> None:
        self._replacements = replacements
        self._bypassed = bypassed
        self._sparse_inputs = sparse_inputs
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []

    def model(self, model: Any) -> Any:
        """The rebuilt model with all weights set."""
        rebuilt = self._rebuild(model)
        for original in self._originals:
            weights = getattr(original, "weights", None)
            if weights:
                copy = self._copies[id(original)]
                copy.set_weights(original.get_weights())
                if hasattr(copy, "finalize_state"):  # Normalization derives constants from its weights.
                    copy.finalize_state()
        return rebuilt

    def _rebuild(self, model: Any) -> Any:
        plain = keras_models.graph(model, name=model.name)
        if keras_models.LEGACY:
            names = [layer.name for layer in plain._input_layers]
            changed = self._sparse_inputs.intersection(names)
            inputs = list(map(self._input, plain.inputs, names)) if changed else None
            return keras.models.clone_model(plain, input_tensors=inputs, clone_function=self._copy)
        inputs = keras.tree.map_structure(lambda tensor: self._input(tensor, tensor.name), plain.input)
        if isinstance(model, keras.Sequential):  # Its input may have been inferred from one batch, size included.
            inputs = keras.Input(inputs.shape[1:], dtype=inputs.dtype, name=inputs.name)
        return keras.models.clone_model(
            plain, input_tensors=inputs, clone_function=self._copy, call_function=self._call if self._bypassed else None
        )

    def _call(self, copy: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a copied operation (Keras 3); those whose work a sparse lookup does hand on their first input."""
        if any(copy is self._copies.get(original) for original in self._bypassed):
            return args[0]
        return copy(*args, **kwargs)

    def _input(self, tensor: Any, name: str) -> Any:
        sparse = name in self._sparse_inputs or bool(getattr(tensor, "sparse", False))
        if keras_models.LEGACY:
            ragged = isinstance(tensor.type_spec, tf.RaggedTensorSpec)
            sparse = sparse or isinstance(tensor.type_spec, tf.SparseTensorSpec)
        else:
            ragged = bool(getattr(tensor, "ragged", False))
        shape = tuple(tensor.shape)
        return keras.Input(
            shape=shape[1:], batch_size=shape[0], dtype=tensor.dtype, name=name, sparse=sparse, ragged=ragged
        )

    def _copy(self, layer: Any) -> Any:
        if id(layer) not in self._copies:
            self._copies[id(layer)] = self._make(layer)
        return self._copies[id(layer)]

    def _make(self, layer: Any) -> Any:
        if id(layer) in self._replacements:
            return self._replacements[id(layer)](layer)
        if keras_models.is_graph_model(layer):
            return self._rebuild(layer)
        if isinstance(layer, keras.layers.Lambda):
            # Its function may be a closure, which get_config cannot always carry; it has no state to share.
            return keras.layers.Lambda(
                layer.function,
                output_shape=layer._output_shape,
                mask=getattr(layer, "mask", None),
                arguments=layer.arguments,
                name=layer.name,
                dtype=layer.dtype_policy,
            )
        self._originals.append(layer)
        try:
            return layer.__class__.from_config(layer.get_config())
        except Exception as error:
            raise NotImplementedError(
                f"not built yet: {type(layer).__name__} '{layer.name}' cannot be rebuilt from its get_config(): {error}"
            ) from error
