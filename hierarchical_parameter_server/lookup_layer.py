"""LookupLayer: rows of dense or ragged ids, in place of a Keras Embedding or tf.nn.embedding_lookup."""

from __future__ import annotations

import tensorflow as tf

from .base_layer import ServerLayer
from .layer_arguments import check_dtype, check_table, check_width
from .lookup_ops import TableRef, check_keys, clip_rows, lookup


@tf.keras.utils.register_keras_serializable(package="hierarchical_parameter_server")
class LookupLayer(ServerLayer):
    """Looks up the rows of ids in a table of the parameter server.

    Args:
        model_name: name of the model in ps.json.
        table_id: number of the table in its model, from 0; or give ``table_name``.
        emb_vec_size: width of the rows; must be the table's.
        emb_vec_dtype: tf.float32, the type of the stored rows.
        ps_config_file: configuration of the server; "": the server of ``hps.Init``, looked for at the first lookup.
        global_batch_size: kept for compatibility; limits nothing.
        table_name: name of the table, instead of ``table_id``.
        mask_zero: ids 0 are padding, and the layer computes a mask as ``keras.layers.Embedding`` does.
        **kwargs: of keras.layers.Layer. With a mixed-precision policy the output has its compute dtype.

    The layer has no weights; gradients stop at its output.
    """

    def __init__(
        self,
        model_name,
        table_id=None,
        emb_vec_size=None,
        emb_vec_dtype=tf.float32,
        ps_config_file="",
        global_batch_size=1,
        table_name=None,
        mask_zero=False,
        **kwargs,
    ):
        super().__init__(model_name, ps_config_file, **kwargs)
        self.emb_vec_size = check_width(emb_vec_size)
        self.emb_vec_dtype = check_dtype(emb_vec_dtype)
        self.global_batch_size = global_batch_size
        self.mask_zero = mask_zero
        self.supports_masking = mask_zero
        self._table = TableRef(self.model_name, check_table(table_id, table_name), self.emb_vec_size)

    def call(self, ids, max_norm=None):
        """Rows of the ids.

        Args:
            ids: int32 or int64, a dense tensor of any shape S or a RaggedTensor.
            max_norm: rows of a larger l2 norm are scaled down to it; a number, a tensor or a variable.

        Returns:
            float32 (or the compute dtype) of shape S + [emb_vec_size]; ragged for ragged ids.

        Raises:
            TypeError: ids that are no integers, or sparse.
            tf.errors.InvalidArgumentError and others: at the lookup, naming model, table and reason.
        """
        if isinstance(ids, tf.SparseTensor):
            raise TypeError("LookupLayer takes dense or ragged ids; use SparseLookupLayer for a SparseTensor")
        if isinstance(ids, tf.RaggedTensor):
            return tf.ragged.map_flat_values(self._rows, ids, max_norm)
        return self._rows(tf.convert_to_tensor(ids), max_norm)

    def _rows(self, ids, max_norm):
        rows = lookup(self._server, [check_keys(ids)], [self._table])[0]
        return tf.cast(clip_rows(rows, max_norm), self.compute_dtype)

    def compute_mask(self, ids, mask=None):
        if not self.mask_zero:
            return None
        symbolic = not tf.is_tensor(ids) and hasattr(tf.keras, "KerasTensor") and isinstance(ids, tf.keras.KerasTensor)
        return (tf.keras.ops if symbolic else tf).not_equal(ids, 0)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.emb_vec_size)

    def get_config(self):
        table = self._table.table
        return {
            **super().get_config(),
            "table_id": None if isinstance(table, str) else table,
            "emb_vec_size": self.emb_vec_size,
            "emb_vec_dtype": self.emb_vec_dtype.name,
            "global_batch_size": self.global_batch_size,
            "table_name": table if isinstance(table, str) else None,
            "mask_zero": self.mask_zero,
        }
