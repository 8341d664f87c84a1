"""Lookups as functions over tensors: thin wrappers of the native ops, and the forms that only arrange tensors.

The layers are built from these. Gradients stop at the rows; only the weights of a sparse lookup have one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import tensorflow as tf

from . import _native
from .resource import ServerResource

COMBINERS = ("sum", "mean", "sqrtn")

_NAME = re.compile(r"[A-Za-z0-9_-]{1,120}")
_NARROW_INTEGERS = (tf.int8, tf.int16, tf.uint8, tf.uint16, tf.uint32)


class TableRef(NamedTuple):  # hashed at each call
    """A table of a model, by name or by number, and the width of its rows."""

    model: str
    table: str | int
    width: int


@dataclass(frozen=True)
class Segments:
    """Which output row each id belongs to: a SparseTensor's indices and dense shape, or a RaggedTensor's row splits."""

    ids: tf.Tensor  # [n]
    segments: tf.Tensor  # int64 [n, rank] or [rows + 1]
    dense_shape: tf.Tensor  # int64 [rank]; unused for row splits
    format: str  # "indices" or "row_splits"

    def rows(self) -> tf.Tensor:
        """Number of output rows, int64 scalar."""
        if self.format == "indices":
            return self.dense_shape[0]
        return tf.size(self.segments, out_type=tf.int64) - 1

    def row_ids(self) -> tf.Tensor:
        """Output row of each id, int64 [n]."""
        return _row_ids(self.segments, self.format)


def _row_ids(segments: tf.Tensor, segment_format: str) -> tf.Tensor:
    if segment_format == "indices":
        return segments[:, 0]
    return tf.ragged.row_splits_to_segment_ids(segments)


def check_keys(ids: tf.Tensor) -> tf.Tensor:
    """Refuses ids that are no integers; narrower integers become int64.

    Raises:
        TypeError: float, string, bool or uint64 ids.
    """
    if ids.dtype in (tf.int32, tf.int64):
        return ids
    if ids.dtype in _NARROW_INTEGERS:
        return tf.cast(ids, tf.int64)
    raise TypeError(
        f"ids must be int32 or int64, but have dtype {ids.dtype.name}; convert them with tf.cast(ids, tf.int64), or "
        f'declare the input as keras.Input(..., dtype="int64")'
    )


def _refuse_xla() -> None:
    if not tf.executing_eagerly() and _native.compiled_by_xla():
        raise tf.errors.UnimplementedError(
            None,
            None,
            "lookups cannot be compiled by XLA: they ask a parameter server. Take the lookup out of the "
            "tf.function(jit_compile=True) and compile what follows it: see docs/layers.md",
        )


def check_name(name: str, what: str) -> str:
    """Refuses what no model or table of a ps.json can be called."""
    if _NAME.fullmatch(name):
        return name
    shown = repr(name) if len(name) <= 120 else f"{name[:40]!r}... of {len(name)} characters"
    raise ValueError(f"{what} must be a name of 1 to 120 letters, digits, '_' and '-', got {shown}")


@functools.lru_cache(maxsize=1024)
def _listed(tables: tuple[TableRef, ...]) -> str:
    """The ops' attribute ``tables``, see cc/ops/table_list.h."""
    check_name(tables[0].model, "a model")
    for table in tables:
        if isinstance(table.table, str):
            check_name(table.table, "a table")
    entries = (f"{table.table}" if isinstance(table.table, str) else f"#{table.table}" for table in tables)
    widths = (table.width for table in tables)
    return f"{tables[0].model}/" + ",".join(f"{entry}:{width}" for entry, width in zip(entries, widths, strict=True))


def lookup(server: ServerResource, keys: Sequence[tf.Tensor], tables: Sequence[TableRef], with_found: bool = False):
    """Rows of keys, for several tables of one model in one op.

    Args:
        server: the server.
        keys: per table int32 or int64 (all of one dtype), of any shape S.
        tables: the tables.
        with_found: also return the found masks.

    Raises:
        tf.errors.UnimplementedError: inside a ``tf.function(jit_compile=True)``.

    Returns:
        A list of float32 tensors of shape S + [width]; with ``with_found`` also a list of bool tensors of shape S.
    """
    _refuse_xla()
    ops = _native.ops()
    if with_found:
        return ops.hierarchical_parameter_server_lookup_with_found(server.handle, keys, _listed(tuple(tables)))
    return ops.hierarchical_parameter_server_lookup(server.handle, keys, _listed(tuple(tables)))


def lookup_stacked(server: ServerResource, keys: tf.Tensor, tables: Sequence[TableRef]) -> tf.Tensor:
    """One row of each of several tables of one model and width for each sample, in one op.

    Args:
        keys: int32 or int64 of shape S + [tables].

    Raises:
        tf.errors.UnimplementedError: inside a ``tf.function(jit_compile=True)``.

    Returns:
        float32 of shape S + [tables, width].
    """
    _refuse_xla()
    return _native.ops().hierarchical_parameter_server_lookup_stacked(
        server.handle, keys, _listed(tuple(tables))
    )


def lookup_sparse(
    server: ServerResource,
    segments: Sequence[Segments],
    tables: Sequence[TableRef],
    combiners: Sequence[str],
    weights: Sequence[tf.Tensor] | None = None,
) -> list[tf.Tensor]:
    """Combined rows, for several tables of one model in one op; all segments in the same format.

    Args:
        weights: per table float32 [n], or None.

    Returns:
        Per table float32 [rows, width]; rows without ids are zeros.
    """
    _refuse_xla()
    return _native.ops().hierarchical_parameter_server_lookup_sparse(
        server=server.handle,
        keys=[part.ids for part in segments],
        segments=[part.segments for part in segments],
        dense_shapes=[part.dense_shape for part in segments],
        weights=list(weights or []),
        combiners=list(combiners),
        segment_format=segments[0].format,
        tables=_listed(tuple(tables)),
    )


tf.no_gradient("HierarchicalParameterServer>Lookup")
tf.no_gradient("HierarchicalParameterServer>LookupWithFound")
tf.no_gradient("HierarchicalParameterServer>LookupStacked")


@tf.RegisterGradient("HierarchicalParameterServer>LookupSparse")
def _lookup_sparse_gradient(op, *gradients):
    """Gradients of the weights; the rows are constants.

    With s = sum(w x): d sum / dw_i = x_i; mean = s / sum(w): (x_i - mean) / sum(w);
    sqrtn = s / q, q = sqrt(sum(w^2)): x_i / q - sqrtn w_i / q^2.
    """
    tables = op.get_attr("N")
    results = [None] * len(op.inputs)
    if op.get_attr("W") == 0:
        return results
    model, _, listed = op.get_attr("tables").decode().partition("/")
    listed = listed.split(",")
    segment_format = op.get_attr("segment_format").decode()
    for i in range(tables):
        keys, segments = op.inputs[1 + i], op.inputs[1 + tables + i]
        weights = op.inputs[1 + 3 * tables + i]
        rows = _native.ops().hierarchical_parameter_server_lookup(op.inputs[0], [keys], f"{model}/{listed[i]}")
        row_ids = _row_ids(segments, segment_format)
        along_row = tf.reduce_sum(rows[0] * tf.gather(gradients[i], row_ids), axis=-1)
        along_output = tf.gather(tf.reduce_sum(op.outputs[i] * gradients[i], axis=-1), row_ids)
        rows_count = tf.shape(gradients[i])[0]
        combiner = op.get_attr("combiners")[i].decode()
        if combiner == "sum":
            gradient = along_row
        elif combiner == "mean":
            total = tf.math.unsorted_segment_sum(weights, row_ids, rows_count)
            gradient = tf.math.divide_no_nan(along_row - along_output, tf.gather(total, row_ids))
        else:
            squares = tf.gather(tf.math.unsorted_segment_sum(weights * weights, row_ids, rows_count), row_ids)
            gradient = tf.math.divide_no_nan(along_row, tf.sqrt(squares))
            gradient -= tf.math.divide_no_nan(along_output * weights, squares)
        results[1 + 3 * tables + i] = tf.reshape(gradient, tf.shape(weights))
    return results


def clip_rows(rows: tf.Tensor, max_norm) -> tf.Tensor:
    """Each row scaled down to at most ``max_norm`` in l2 norm, as tf.nn.embedding_lookup does; None changes nothing."""
    return rows if max_norm is None else tf.clip_by_norm(rows, tf.cast(max_norm, rows.dtype), axes=[-1])


def _checked(segments: Segments, weights: tf.Tensor | None) -> Segments:
    """The same segments behind the checks that the fused op makes itself."""
    check = tf.debugging
    count = tf.size(segments.ids, out_type=tf.int64)
    rows = segments.segments
    if segments.format == "indices":
        bounds = "sparse ids: indices must lie within the dense shape"
        checks = [
            check.assert_equal(tf.shape(rows, tf.int64)[0], count, "sparse ids: each id needs one line of indices"),
            check.assert_non_negative(rows, bounds),
            check.assert_less(rows, segments.dense_shape[tf.newaxis], bounds),
        ]
        rows = rows[:, 0]
    else:
        checks = [
            check.assert_equal(rows[0], tf.constant(0, tf.int64), "ragged ids: row_splits must begin with 0"),
            check.assert_equal(rows[-1], count, "ragged ids: row_splits must end with the number of ids"),
        ]
    checks.append(check.assert_less_equal(rows[:-1], rows[1:], "rows must not descend; use tf.sparse.reorder"))
    if weights is not None:
        checks.append(check.assert_equal(tf.size(weights, tf.int64), count, "weights: each id needs one weight"))
    with tf.control_dependencies([made for made in checks if made is not None]):
        return replace(segments, ids=tf.identity(segments.ids), segments=tf.identity(segments.segments))


def lookup_sparse_clipped(
    server: ServerResource, segments: Segments, table: TableRef, combiner: str, weights: tf.Tensor | None, max_norm
) -> tf.Tensor:
    """A sparse lookup whose rows are clipped before they are combined, by TensorFlow's own kernels in its own order."""
    segments = _checked(segments, weights)
    unique, position = tf.unique(segments.ids)
    rows = clip_rows(lookup(server, [unique], [table])[0], max_norm)
    row_ids = segments.row_ids()
    row_count = segments.rows()
    if weights is None:
        combine = {
            "sum": tf.sparse.segment_sum,
            "mean": tf.sparse.segment_mean,
            "sqrtn": tf.sparse.segment_sqrt_n,
        }[combiner]
        combined = combine(rows, position, row_ids, num_segments=row_count)
    else:
        weights = tf.cast(weights, tf.float64)[:, tf.newaxis]
        weighted = tf.gather(tf.cast(rows, tf.float64), position) * weights
        combined = tf.math.unsorted_segment_sum(weighted, row_ids, row_count)
        if combiner == "mean":
            combined = tf.math.divide_no_nan(combined, tf.math.unsorted_segment_sum(weights, row_ids, row_count))
        elif combiner == "sqrtn":
            squares = tf.math.unsorted_segment_sum(weights * weights, row_ids, row_count)
            combined = tf.math.divide_no_nan(combined, tf.sqrt(squares))
        combined = tf.cast(combined, tf.float32)
    return tf.ensure_shape(combined, [None, table.width])
