"""The layers that take the place of Keras embeddings in a converted model."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hierarchical_parameter_server.lookup_layer import LookupLayer
from hierarchical_parameter_server.sparse_lookup_layer import SparseLookupLayer


@tf.keras.utils.register_keras_serializable(package="hierarchical_parameter_server")
class EmbeddingLookup(LookupLayer):
    """A `LookupLayer` that takes what the `tf.keras.layers.Embedding` it replaces takes.

    Ids that are no integers (Keras inputs are float32 unless told otherwise) are cast to int32, as Keras does. One
    difference remains: an id that is not in the table gives the table's default value, not an error.
    """

    def call(self, ids: Any, max_norm: Any = None) -> Any:
        """Rows of `ids`, of shape ids.shape + [emb_vec_size]."""
        if not tf.as_dtype(ids.dtype).is_integer:
            ids = tf.cast(ids, tf.int32)
        return super().call(ids, max_norm=max_norm)


@tf.keras.utils.register_keras_serializable(package="hierarchical_parameter_server")
class MeanLookup(SparseLookupLayer):
    """The mean of the rows of each sample: an `Embedding(mask_zero=True)` and its `GlobalAveragePooling1D` in one.

    Takes a SparseTensor of ids, shape [batch, n]; returns [batch, emb_vec_size]. A sample without ids gives zeros
    (the Keras pair gives NaN). An id 0 in the tensor is a key like any other: padding is what is absent.
    """

    def call(self, sp_ids: Any) -> Any:
        """sp_ids: SparseTensor of integer ids, shape [batch, n]. Returns [batch, emb_vec_size]."""
        return super().call(sp_ids, combiner="mean")
