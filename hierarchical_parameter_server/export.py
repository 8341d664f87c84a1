"""Export of Keras models with HPS layers as SavedModels that serve by themselves.

``model.export`` and ``tf.saved_model.save`` work too, for models with dense inputs; this helper also keeps sparse and
ragged inputs, and can take the tables along.
"""

from __future__ import annotations

import json
import os
import shutil

import tensorflow as tf

from .resource import ServerResource

TABLES_FOLDER = "hps_tables"


class _Servable(tf.Module):
    """What the SavedModel holds: the model's variables, its server resources and the serving function. Tracking the
    Keras model itself would trace it with dense inputs, which models with sparse inputs do not take."""


def _layers(model):
    """All layers, nested models' included."""
    flatten = getattr(model, "_flatten_layers", None)
    return list(flatten()) if flatten else list(model.layers)


def _server_resources(model) -> list[ServerResource]:
    resources = []
    for layer in _layers(model):
        resource = getattr(layer, "_server", None)
        if isinstance(resource, ServerResource) and resource not in resources:
            resources.append(resource)
    return resources


def _input_spec(tensor):
    """Name and TypeSpec of a symbolic model input."""
    spec = getattr(tensor, "type_spec", None)  # legacy Keras
    name = tensor.name.split(":")[0]
    if isinstance(spec, (tf.SparseTensorSpec, tf.RaggedTensorSpec)):
        return name, spec
    shape, dtype = tensor.shape, tf.as_dtype(tensor.dtype)
    if getattr(tensor, "sparse", False):
        return name, tf.SparseTensorSpec(shape, dtype)
    if getattr(tensor, "ragged", False):
        return name, tf.RaggedTensorSpec(shape, dtype, ragged_rank=1)
    return name, tf.TensorSpec(shape, dtype, name=name)


def _flat_specs(name, spec):
    """The dense tensors that a serving client sends for one input, by name."""
    if isinstance(spec, tf.SparseTensorSpec):
        return {
            f"{name}_indices": tf.TensorSpec([None, spec.shape.rank], tf.int64),
            f"{name}_values": tf.TensorSpec([None], spec.dtype),
            f"{name}_dense_shape": tf.TensorSpec([spec.shape.rank], tf.int64),
        }
    if isinstance(spec, tf.RaggedTensorSpec):
        return {
            f"{name}_values": tf.TensorSpec([None], spec.dtype),
            f"{name}_row_splits": tf.TensorSpec([None], spec.row_splits_dtype),
        }
    return {name: spec}


def _from_flat(name, spec, flat):
    """The input that the tensors of _flat_specs stand for."""
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.SparseTensor(flat[f"{name}_indices"], flat[f"{name}_values"], flat[f"{name}_dense_shape"])
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensor.from_row_splits(flat[f"{name}_values"], flat[f"{name}_row_splits"], validate=False)
    return flat[name]


def export(model, path: str | os.PathLike, include_tables: bool = False, overwrite: bool = False) -> str:
    """Writes a functional or sequential Keras model as a SavedModel that initialises its server at load.

    Args:
        model: a built Keras model, of Keras 3 or of legacy Keras.
        path: the folder to write; must not exist, unless ``overwrite``.
        include_tables: copy the tables' folders into the SavedModel (``assets.extra``), so that it can be moved as a
            whole. Otherwise its configuration has the absolute paths of the tables.
        overwrite: replace an existing folder.

    Returns:
        The path. The loaded object's ``serve`` takes a dict of the model's inputs by name. The signature
        "serving_default" takes dense tensors only: ``NAME`` for a dense input; ``NAME_indices``, ``NAME_values`` and
        ``NAME_dense_shape`` for a sparse one; ``NAME_values`` and ``NAME_row_splits`` for a ragged one. Both return the
        outputs by name (or "output_0", ... where they have none). Layers without ps_config_file use the server that
        the loading process has initialised.

    Raises:
        ValueError: the model is not built, or ``include_tables`` is set and no layer has a configuration.
        FileExistsError: the folder exists.
    """
    path = os.fspath(path)
    if os.path.exists(path):
        if not overwrite:
            raise FileExistsError(f"{path} exists; choose another folder or give overwrite=True")
        shutil.rmtree(path)
    if not getattr(model, "inputs", None):
        raise ValueError(
            "the model has no inputs; give a functional model, or a sequential one that begins with keras.Input "
            "(tf.saved_model.save and model.export take others)"
        )
    resources = _server_resources(model)
    if include_tables and not any(resource.ps_config_file for resource in resources):
        raise ValueError(
            "include_tables needs the tables' places, but no HPS layer of the model has ps_config_file; give the "
            "layers ps_config_file"
        )
    names, specs = zip(*(_input_spec(tensor) for tensor in model.inputs), strict=True)
    output_names = getattr(model, "output_names", None) or []
    structure = _input_structure(model)
    single = not isinstance(structure, (list, tuple, dict))

    by_name = dict(zip(names, specs, strict=True))
    flat_specs = {key: spec for name in names for key, spec in _flat_specs(name, by_name[name]).items()}

    @tf.function(input_signature=[by_name])
    def serve(inputs):
        values = [inputs[name] for name in names]
        outputs = tf.nest.flatten(model(values[0] if single else _like(structure, names, values), training=False))
        named = len(set(output_names)) == len(outputs)
        keys = output_names if named else [f"output_{i}" for i in range(len(outputs))]
        return dict(zip(keys, outputs, strict=True))

    @tf.function
    def serve_flat(**flat):
        return serve({name: _from_flat(name, spec, flat) for name, spec in by_name.items()})

    servable = _Servable()
    # Keras 3 wraps TensorFlow's variables, legacy Keras uses them as they are.
    servable.model_variables = [v if isinstance(v, tf.Variable) else v.value for v in model.variables]
    servable.servers = resources
    servable.serve = serve
    signature = serve_flat.get_concrete_function(
        **{key: tf.TensorSpec(spec.shape, spec.dtype, name=key) for key, spec in flat_specs.items()}
    )
    tf.saved_model.save(servable, path, signatures={"serving_default": signature})
    if include_tables:
        _include_tables(path)
    return path


def _input_structure(model):
    """What the model takes: a tensor, or a list or dict of them."""
    try:
        return model.input
    except AttributeError:  # a sequential model of Keras 3
        return model.inputs[0]


def _like(structure, names, values):
    """`values` in the structure of the model's inputs."""
    if isinstance(structure, dict):
        by_name = dict(zip(names, values, strict=True))
        return {key: by_name[tensor.name.split(":")[0]] for key, tensor in structure.items()}
    return list(values)


def _include_tables(path: str) -> None:
    """Copies the tables that the exported configurations name below assets.extra, and makes the paths relative.

    A folder that several models name is copied once, so that models which share its rows still do.
    """
    assets = os.path.join(path, "assets")
    for number, name in enumerate(sorted(os.listdir(assets))):
        asset = os.path.join(assets, name)
        try:
            with open(asset, encoding="utf-8") as file:
                config = json.load(file)
            models = config["models"]
        except (ValueError, KeyError, TypeError):
            continue  # an asset of another layer
        places: dict[str, str] = {}  # of the copies, by the folder
        for model in models:
            copied = []
            for i, table in enumerate(model["sparse_files"]):
                source = os.path.realpath(table)
                if source in places:
                    copied.append(places[source])
                    continue
                folder = os.path.join(TABLES_FOLDER, str(number), model["model"], f"{i}_{os.path.basename(table)}")
                target = os.path.join(path, "assets.extra", folder)
                os.makedirs(target)
                for file_name in ("key", "emb_vector"):
                    shutil.copy2(os.path.join(table, file_name), target)
                places[source] = os.path.join("..", "assets.extra", folder)
                copied.append(places[source])
            model["sparse_files"] = copied
        with open(asset, "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2)
