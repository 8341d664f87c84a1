"""From the ids a model gets (sparse, ragged, dense) to the segments that the sparse lookup op takes."""

from __future__ import annotations

import tensorflow as tf

from .lookup_ops import Segments, check_keys


def _no_shape() -> tf.Tensor:
    return tf.zeros([0], tf.int64)


def segments_of(ids, weights=None, padding_value=None) -> tuple[Segments, tf.Tensor | None]:
    """Arranges the ids of one table and their weights.

    Args:
        ids: SparseTensor or RaggedTensor of rank 2, or a dense tensor [rows, ids per row].
        weights: of the same kind and shape, float; or None.
        padding_value: in dense ids, entries of this value are no ids; None: every entry is one.

    Returns:
        The segments and float32 weights [n], or None.

    Raises:
        TypeError: ids that are no integers, or weights of another kind than the ids.
        ValueError: ids of another rank.
    """
    for kind in (tf.SparseTensor, tf.RaggedTensor):
        if weights is not None and isinstance(ids, kind) != isinstance(weights, kind):
            raise TypeError(
                f"sp_weights must be of the same kind as sp_ids: got {type(weights).__name__} weights for "
                f"{type(ids).__name__} ids"
            )
    if isinstance(ids, tf.SparseTensor):
        _check_rank(ids.shape, at_least=2)
        segments = Segments(check_keys(ids.values), ids.indices, ids.dense_shape, "indices")
        return segments, None if weights is None else _as_weights(weights.values)
    if isinstance(ids, tf.RaggedTensor):
        if ids.ragged_rank != 1 or ids.flat_values.shape.rank not in (1, None):
            raise ValueError(f"ragged ids must have rank 2 and one ragged dimension, but have the shape {ids.shape}")
        segments = Segments(check_keys(ids.values), tf.cast(ids.row_splits, tf.int64), _no_shape(), "row_splits")
        return segments, None if weights is None else _as_weights(weights.flat_values)
    ids = tf.convert_to_tensor(ids)
    _check_rank(ids.shape)
    return _segments_of_dense(check_keys(ids), weights, padding_value)


def _segments_of_dense(ids, weights, padding_value):
    flat = tf.reshape(ids, [-1])
    shape = tf.shape(ids, out_type=tf.int64)
    if weights is not None:
        weights = _as_weights(tf.convert_to_tensor(weights))
        same = tf.debugging.assert_equal(
            tf.shape(weights, out_type=tf.int64), shape, "sp_weights must have the shape of sp_ids"
        )
        with tf.control_dependencies([same] if same is not None else []):
            weights = tf.reshape(weights, [-1])
    if padding_value is None or not ids.dtype.min <= padding_value <= ids.dtype.max:  # no id can be it
        splits = tf.range(shape[0] + 1) * shape[1]
    else:
        kept = tf.not_equal(ids, tf.cast(padding_value, ids.dtype))
        lengths = tf.reduce_sum(tf.cast(kept, tf.int64), axis=1)
        splits = tf.concat([tf.zeros([1], tf.int64), tf.cumsum(lengths)], axis=0)
        kept = tf.reshape(kept, [-1])
        flat = tf.boolean_mask(flat, kept)
        weights = None if weights is None else tf.boolean_mask(weights, kept)
    return Segments(flat, splits, _no_shape(), "row_splits"), weights


def _check_rank(shape, at_least=None):
    rank = shape.rank
    if rank is None or rank == 2 or (at_least is not None and rank >= at_least):
        return
    raise ValueError(f"ids must have rank 2, [rows, ids per row], but have the shape {shape}")


def _as_weights(weights):
    if not weights.dtype.is_floating:
        raise TypeError(f"sp_weights must be floating point, but have dtype {weights.dtype.name}")
    return tf.cast(weights, tf.float32)
