"""Embedding tables among the variables of a TensorFlow checkpoint or SavedModel, found without running any graph."""

from __future__ import annotations

import errno
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import node_def_pb2
from tensorflow.core.protobuf import saved_model_pb2, trackable_object_graph_pb2

from hierarchical_parameter_server.convert.report import NotTaken
from hierarchical_parameter_server.convert.tables import Table, is_float

_VALUE_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
_GATHERS = {"ResourceGather", "GatherV2", "Gather"}
_PASS_THROUGH = {"Identity", "ReadVariableOp", "Cast", "Enter"}
_BRANCHES = {"If", "StatelessIf", "Case", "StatelessCase"}

Found = tuple[list[Table], list[NotTaken]]


def from_checkpoint(prefix: str, pattern: str | None) -> Found:
    """Tables of a checkpoint: it knows no graph, so they are told by their names.

    Args:
        prefix: path of the checkpoint without `.index`.
        pattern: regular expression; variables whose name contains a match are taken. By default those whose last
            name component contains "embed" in any case, and that are no optimizer state.
    """
    regex = re.compile(pattern if pattern is not None else r"(?i)embed[^/]*$")
    reason = f"no match for {regex.pattern!r}" if pattern is not None else "last part of the name has no 'embed'"
    return _select(_Checkpoint(prefix), lambda key, name: None if regex.search(name) else reason)


def from_saved_model(folder: pathlib.Path, pattern: str | None) -> Found:
    """Tables of a SavedModel: the variables that its functions gather rows from.

    Args:
        folder: the SavedModel.
        pattern: regular expression; variables whose name contains a match are taken, gathered from or not.

    Raises:
        ValueError: the file is no SavedModel.
    """
    prefix = str(folder / "variables" / "variables")
    saved_model = saved_model_pb2.SavedModel()
    try:
        saved_model.ParseFromString((folder / "saved_model.pb").read_bytes())
        meta_graph = saved_model.meta_graphs[0]
    except Exception as error:  # protobuf's DecodeError, or no graph at all.
        raise ValueError(f"{folder / 'saved_model.pb'} is damaged: {error}") from error
    if not pathlib.Path(prefix + ".index").exists():
        return [], []
    checkpoint = _Checkpoint(prefix)
    gathered = _gathered_keys(meta_graph, checkpoint.keys_of_nodes)

    def refusal(key: str, name: str) -> str | None:
        if pattern is not None:
            return None if re.search(pattern, name) else f"no match for {pattern!r}"
        return None if key in gathered else "no function gathers rows from it"

    return _select(checkpoint, refusal)


class _Checkpoint:
    """The variables of a checkpoint, and what its object graph (TensorFlow 2) knows about them.

    Attributes:
        reader: TensorFlow's reader.
        keys_of_nodes: checkpoint key of each variable of the object graph, by node number; empty for TensorFlow 1.
        optimizer_keys: keys that hold state of an optimizer.
    """

    def __init__(self, prefix: str) -> None:
        self.keys_of_nodes: dict[int, str] = {}
        self.optimizer_keys: set[str] = set()
        self._names: dict[str, str] = {}
        try:
            self.reader = tf.train.load_checkpoint(prefix)
            if self.reader.has_tensor(_OBJECT_GRAPH_KEY):
                objects = trackable_object_graph_pb2.TrackableObjectGraph()
                objects.ParseFromString(self.reader.get_tensor(_OBJECT_GRAPH_KEY))
                self._read(objects.nodes)
        except tf.errors.OpError as error:
            raise ValueError(f"{prefix} is damaged: {error.message}") from error

    def _read(self, nodes) -> None:
        for number, node in enumerate(nodes):
            for attribute in node.attributes:
                self.keys_of_nodes[number] = attribute.checkpoint_key
                if attribute.full_name and not attribute.full_name.startswith("Variable"):
                    self._names[attribute.checkpoint_key] = attribute.full_name
        for node in nodes:
            children = {child.local_name: child.node_id for child in node.children}
            slots = [slot.slot_variable_node_id for slot in node.slot_variables]
            if {"_iterations", "_variables"} <= children.keys():  # An optimizer of Keras.
                slots.extend(child.node_id for child in nodes[children["_variables"]].children)
            self.optimizer_keys.update(self.keys_of_nodes[slot] for slot in slots if slot in self.keys_of_nodes)

    def name(self, key: str) -> str:
        """The variable's own name if it was given one, otherwise its path in the object graph."""
        return self._names.get(key, key.removesuffix(_VALUE_SUFFIX))


def _select(checkpoint: _Checkpoint, refusal: Callable[[str, str], str | None]) -> Found:
    """Sorts variables into tables and others; `refusal(key, name)` says why one is no table, or None."""
    shapes = checkpoint.reader.get_variable_to_shape_map()
    dtypes = checkpoint.reader.get_variable_to_dtype_map()
    tables: list[Table] = []
    not_taken: list[NotTaken] = []
    taken: set[tuple[str, tuple[int, ...]]] = set()
    for key in sorted(shapes):
        if dtypes[key] == tf.string:
            continue
        shape, name = tuple(shapes[key]), checkpoint.name(key)
        reason = "optimizer state" if key in checkpoint.optimizer_keys else refusal(key, name)
        if reason is None and len(shape) != 2:
            reason = f"shape has {len(shape)} dimensions, a table has 2"
        if reason is None and 0 in shape:
            reason = "it is empty"
        if reason is None and not is_float(np.dtype(dtypes[key].as_numpy_dtype)):
            reason = "values are not floating point"
        if reason is None:
            tables.append(_table(checkpoint.reader, key, name, shape, dtypes[key]))
            taken.add((name, shape))
        else:
            not_taken.append(NotTaken(name, shape, dtypes[key].name, reason))
    # Keras 3 exports a variable twice, and only one of the two is read by a function.
    return tables, [entry for entry in dict.fromkeys(not_taken) if (entry.source, entry.shape) not in taken]


def _table(reader, key: str, name: str, shape: tuple[int, ...], dtype: tf.DType) -> Table:
    loaded: list[np.ndarray] = []

    def read(start: int, stop: int) -> np.ndarray:
        # The reader gives whole variables only, checksums verified: hold one from its first slice to its last.
        if not loaded:
            try:
                loaded.append(reader.get_tensor(key))
            except tf.errors.OpError as error:
                raise OSError(errno.EIO, f"variable {name} cannot be read: {error.message}") from error
        rows = loaded[0][start:stop]
        if stop == shape[0]:
            loaded.clear()
        return rows

    source = re.sub(r"/_?embeddings?(_weights)?$", "", name) or name
    return Table(source=source, rows=shape[0], width=shape[1], dtype=np.dtype(dtype.as_numpy_dtype), read=read)


def _gathered_keys(meta_graph, keys_of_nodes: Mapping[int, str]) -> set[str]:
    """Checkpoint keys of the variables that any function or signature gathers from."""
    library = {function.signature.name: function for function in meta_graph.graph_def.library.function}
    found: set[str] = set()
    visited: set[tuple] = set()

    def call(name: str, arguments: list[frozenset[str]]) -> None:
        function = library.get(name)
        if function is None or (name, tuple(arguments)) in visited:
            return
        visited.add((name, tuple(arguments)))
        names = [argument.name for argument in function.signature.input_arg]
        walk(function.node_def, dict(zip(names, arguments, strict=False)))

    def walk(nodes: Iterable[node_def_pb2.NodeDef], values: dict[str, frozenset[str]]) -> None:
        for node in _in_order(nodes):
            inputs = [values.get(_base(name), frozenset()) for name in node.input if not name.startswith("^")]
            if node.op in _GATHERS:
                found.update(inputs[0])
            elif node.op in _PASS_THROUGH:
                values[node.name] = inputs[0]
            elif node.op in ("VarHandleOp", "VariableV2"):
                shared = node.attr["shared_name"].s.decode()
                values[node.name] = frozenset({shared or node.name})
            elif any(inputs):
                skip = 1 if node.op in _BRANCHES else 0
                for name in _functions(node, library):
                    call(name, inputs[skip:])

    for name, function in meta_graph.object_graph_def.concrete_functions.items():
        if name in library:
            bound = [
                frozenset({keys_of_nodes[n]}) if n in keys_of_nodes else frozenset() for n in function.bound_inputs
            ]
            free = len(library[name].signature.input_arg) - len(bound)
            call(name, [frozenset()] * free + bound)
    if not keys_of_nodes:  # A TensorFlow 1 graph: its variables are saved under their names.
        walk(meta_graph.graph_def.node, {})
    return found


def _functions(node: node_def_pb2.NodeDef, library: Mapping) -> list[str]:
    names = [node.op] if node.op in library else []
    for value in node.attr.values():
        names.extend([value.func.name] if value.func.name else [])
        names.extend(function.name for function in value.list.func)
    return names


def _base(name: str) -> str:
    return name.split(":", 1)[0]


def _in_order(nodes: Iterable[node_def_pb2.NodeDef]) -> list[node_def_pb2.NodeDef]:
    """Nodes so that each follows its inputs; function bodies are stored in any order."""
    by_name = {node.name: node for node in nodes}
    order: list[node_def_pb2.NodeDef] = []
    state: dict[str, bool] = {}
    for root in by_name:
        stack = [root]
        while stack:
            name = stack[-1]
            if name in state:
                stack.pop()
                if not state[name]:
                    state[name] = True
                    order.append(by_name[name])
                continue
            state[name] = False
            stack.extend(_base(i) for i in by_name[name].input if _base(i) in by_name and _base(i) not in state)
    return order
