"""StackedLookupLayer: one row of each of several tables of equal width, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from .base_layer import ServerLayer
from .layer_arguments import check_tables, check_width
from .lookup_ops import TableRef, check_keys, lookup_stacked


@tf.keras.utils.register_keras_serializable(package="hierarchical_parameter_server")
class StackedLookupLayer(ServerLayer):
    """Looks up the ids of a sample's categorical features, one of each table, in one op.

    What ``MultiLookupLayer`` and ``tf.stack`` give, without the copies: on a GPU each row is written where it belongs.

    Args:
        model_name: name of the model in ps.json.
        tables: per feature the table's name (str) or its number in the model (int); a table may occur more than once.
        emb_vec_size: width of the rows of all these tables.
        ps_config_file: configuration of the server; "": the server of ``hps.Init``, looked for at the first lookup.
        **kwargs: of keras.layers.Layer. With a mixed-precision policy the output has its compute dtype.

    The layer has no weights; gradients stop at its output.
    """

    def __init__(self, model_name, tables: Sequence[str | int], emb_vec_size=None, ps_config_file="", **kwargs):
        super().__init__(model_name, ps_config_file, **kwargs)
        self.emb_vec_size = check_width(emb_vec_size)
        self._tables = [TableRef(self.model_name, table, self.emb_vec_size) for table in check_tables(tables)]

    def call(self, ids):
        """Rows of the ids.

        Args:
            ids: int32 or int64 of shape S + [len(tables)], such as [batch, features].

        Returns:
            float32 (or the compute dtype) of shape S + [len(tables), emb_vec_size].

        Raises:
            TypeError: ids that are no integers.
            tf.errors.InvalidArgumentError and others: a last dimension that does not count the tables; at the lookup,
                naming model, table and reason.
        """
        if isinstance(ids, (tf.SparseTensor, tf.RaggedTensor)):
            raise TypeError("StackedLookupLayer takes a dense tensor, one id of each table for each sample")
        rows = lookup_stacked(self._server, check_keys(tf.convert_to_tensor(ids)), self._tables)
        return tf.cast(rows, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.emb_vec_size)

    def get_config(self):
        return {
            **super().get_config(),
            "tables": [table.table for table in self._tables],
            "emb_vec_size": self.emb_vec_size,
        }
