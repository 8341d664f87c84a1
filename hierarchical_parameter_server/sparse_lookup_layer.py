"""SparseLookupLayer: combined rows of sparse, ragged or padded ids, in place of tf.nn.embedding_lookup_sparse."""

from __future__ import annotations

import tensorflow as tf

from .base_layer import ServerLayer
from .layer_arguments import check_combiner, check_dtype, check_padding_value, check_table, check_width
from .lookup_ops import TableRef, lookup_sparse, lookup_sparse_clipped
from .sparse_ids import segments_of


@tf.keras.utils.register_keras_serializable(package="hierarchical_parameter_server")
class SparseLookupLayer(ServerLayer):
    """Looks up the rows of ids in a table of the parameter server and combines them per output row.

    Args:
        model_name: name of the model in ps.json.
        table_id: number of the table in its model, from 0; or give ``table_name``.
        emb_vec_size: width of the rows; must be the table's.
        emb_vec_dtype: tf.float32, the type of the stored rows.
        ps_config_file: configuration of the server; "": the server of ``hps.Init``, looked for at the first lookup.
        global_batch_size: kept for compatibility; limits nothing.
        table_name: name of the table, instead of ``table_id``.
        padding_value: in dense ids, entries of this value are no ids. None: every entry is one (-1 is a legal id).
        **kwargs: of keras.layers.Layer. With a mixed-precision policy the output has its compute dtype.

    The layer has no weights of its own. Gradients stop at the rows and flow to ``sp_weights``.
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
        padding_value=None,
        **kwargs,
    ):
        super().__init__(model_name, ps_config_file, **kwargs)
        self.emb_vec_size = check_width(emb_vec_size)
        self.emb_vec_dtype = check_dtype(emb_vec_dtype)
        self.global_batch_size = global_batch_size
        self.padding_value = check_padding_value(padding_value)
        self._table = TableRef(self.model_name, check_table(table_id, table_name), self.emb_vec_size)

    def call(self, sp_ids, sp_weights=None, name=None, combiner=None, max_norm=None):
        """Combined rows of the ids.

        Args:
            sp_ids: int32 or int64: a SparseTensor whose first index is the output row, a RaggedTensor of rank 2, or a
                dense tensor [rows, ids per row].
            sp_weights: floats of the same kind and shape, or None: all ones.
            name: name of the output tensor.
            combiner: "sum", "mean" (also for None) or "sqrtn".
            max_norm: rows of a larger l2 norm are scaled down to it before they are combined; a number, a tensor or a
                variable.

        Returns:
            float32 (or the compute dtype) [rows, emb_vec_size], with as many rows as the ids have; rows without ids are
            zeros.

        Raises:
            TypeError, ValueError: ids or weights of a wrong kind, an unknown combiner.
            tf.errors.InvalidArgumentError and others: at the lookup, naming model, table and reason.
        """
        combiner = check_combiner(combiner)
        segments, weights = segments_of(sp_ids, sp_weights, self.padding_value)
        if max_norm is None:
            combined = lookup_sparse(
                self._server, [segments], [self._table], [combiner], None if weights is None else [weights]
            )[0]
        else:
            combined = lookup_sparse_clipped(self._server, segments, self._table, combiner, weights, max_norm)
        rows = sp_ids.shape[0] if hasattr(sp_ids, "shape") else None
        combined = tf.ensure_shape(combined, [rows, self.emb_vec_size])
        return tf.identity(tf.cast(combined, self.compute_dtype), name=name)

    def compute_output_shape(self, input_shape, *args, **kwargs):
        return (input_shape[0], self.emb_vec_size)

    def get_config(self):
        table = self._table.table
        return {
            **super().get_config(),
            "table_id": None if isinstance(table, str) else table,
            "emb_vec_size": self.emb_vec_size,
            "emb_vec_dtype": self.emb_vec_dtype.name,
            "global_batch_size": self.global_batch_size,
            "table_name": table if isinstance(table, str) else None,
            "padding_value": self.padding_value,
        }
