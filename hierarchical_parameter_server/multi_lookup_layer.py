"""MultiLookupLayer: several tables of one model, dense and sparse mixed, in as few op calls as possible."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from .base_layer import ServerLayer
from .layer_arguments import check_combiner, check_padding_value, check_tables, check_width
from .lookup_ops import TableRef, check_keys, lookup, lookup_sparse
from .sparse_ids import segments_of


@tf.keras.utils.register_keras_serializable(package="hierarchical_parameter_server")
class MultiLookupLayer(ServerLayer):
    """Looks up several tables of one model at once.

    All plain tables are one op call and all combined ones of a kind another: 100 tables cost little more than one.

    Args:
        model_name: name of the model in ps.json.
        tables: per table its name (str) or its number in the model (int).
        emb_vec_sizes: per table the width of its rows.
        combiners: per table None for plain rows, or "sum", "mean", "sqrtn" for combined rows. Default: plain rows.
        ps_config_file: configuration of the server; "": the server of ``hps.Init``, looked for at the first lookup.
        padding_value: in dense ids of combined tables, entries of this value are no ids.
        **kwargs: of keras.layers.Layer.
    """

    def __init__(
        self,
        model_name,
        tables: Sequence[str | int],
        emb_vec_sizes: Sequence[int],
        combiners: Sequence[str | None] | None = None,
        ps_config_file="",
        padding_value=None,
        **kwargs,
    ):
        super().__init__(model_name, ps_config_file, **kwargs)
        self.padding_value = check_padding_value(padding_value)
        names = check_tables(tables)
        widths = list(emb_vec_sizes)
        combiners = [None] * len(names) if combiners is None else list(combiners)
        if len(widths) != len(names) or len(combiners) != len(names):
            raise ValueError(
                f"tables, emb_vec_sizes and combiners must be equally long, got {len(names)}, {len(widths)} and "
                f"{len(combiners)}"
            )
        self._combiners = [None if combiner is None else check_combiner(combiner) for combiner in combiners]
        self._tables = [
            TableRef(self.model_name, name, check_width(width)) for name, width in zip(names, widths, strict=True)
        ]

    def call(self, ids, weights=None):
        """Rows of all tables.

        Args:
            ids: a list with the ids of each table: dense or ragged for plain tables; sparse, ragged or dense [rows, ids
                per row] for combined ones. int32 or int64.
            weights: a list with the weights of each table, None for tables without; or None.

        Returns:
            A list: per plain table S + [width] for ids of shape S, per combined table [rows, width].
        """
        if len(ids) != len(self._tables):
            raise ValueError(f"the layer has {len(self._tables)} tables and got ids for {len(ids)}")
        weights = [None] * len(ids) if weights is None else list(weights)
        if len(weights) != len(ids):
            raise ValueError(f"the layer has {len(ids)} tables and got weights for {len(weights)}")
        results = [None] * len(ids)
        self._lookup_plain(ids, weights, results)
        self._lookup_combined(ids, weights, results)
        return [tf.cast(rows, self.compute_dtype) for rows in results]

    def _lookup_plain(self, ids, weights, results):
        groups = {}  # tables whose keys have one dtype are one call
        for i, combiner in enumerate(self._combiners):
            if combiner is not None:
                continue
            if weights[i] is not None:
                raise ValueError(f"table {self._tables[i].table!r} has no combiner and takes no weights")
            if isinstance(ids[i], tf.SparseTensor):
                raise TypeError(f"table {self._tables[i].table!r} has no combiner and takes no SparseTensor")
            ragged = isinstance(ids[i], tf.RaggedTensor)
            keys = check_keys(ids[i].flat_values if ragged else tf.convert_to_tensor(ids[i]))
            groups.setdefault(keys.dtype, []).append((i, keys))
        for members in groups.values():
            rows = lookup(self._server, [keys for _, keys in members], [self._tables[i] for i, _ in members])
            for (i, _), table_rows in zip(members, rows, strict=True):
                ragged = isinstance(ids[i], tf.RaggedTensor)
                results[i] = ids[i].with_flat_values(table_rows) if ragged else table_rows

    def _lookup_combined(self, ids, weights, results):
        groups = {}
        for i, combiner in enumerate(self._combiners):
            if combiner is None:
                continue
            segments, table_weights = segments_of(ids[i], weights[i], self.padding_value)
            kind = (segments.format, segments.ids.dtype, table_weights is None)
            groups.setdefault(kind, []).append((i, segments, table_weights))
        for (_, _, unweighted), members in groups.items():
            combined = lookup_sparse(
                self._server,
                [segments for _, segments, _ in members],
                [self._tables[i] for i, _, _ in members],
                [self._combiners[i] for i, _, _ in members],
                None if unweighted else [table_weights for _, _, table_weights in members],
            )
            for (i, _, _), rows in zip(members, combined, strict=True):
                results[i] = tf.ensure_shape(rows, [ids[i].shape[0], self._tables[i].width])

    def compute_output_shape(self, input_shape, *args, **kwargs):
        return [
            (*shape, table.width) if combiner is None else (shape[0], table.width)
            for shape, table, combiner in zip(input_shape, self._tables, self._combiners, strict=True)
        ]

    def get_config(self):
        return {
            **super().get_config(),
            "tables": [table.table for table in self._tables],
            "emb_vec_sizes": [table.width for table in self._tables],
            "combiners": list(self._combiners),
            "padding_value": self.padding_value,
        }
