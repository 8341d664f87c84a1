"""The peers: adapters with the same three calls.

- prepare(data): takes the table in; once per table.
- lookup(case, axes): the function to be measured, from the ids of a call to its rows; None where the peer has none.
- close(): frees the table.

What is measured takes what `batch` made of the ids, so that the conversion from numpy is not part of a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import tensorflow as tf

import hierarchical_parameter_server as hps
from hierarchical_parameter_server import lookup_ops
from hierarchical_parameter_server.resource import server_resource

from .axes import COMBINER, Axes
from .workload import MODEL, Case, TableData, scatter

Lookup = Callable[[object], object]


@cache
def _sparse_frame(batch: int, ids_per_sample: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Indices [batch * ids_per_sample, 2] and dense shape of a batch; one for all calls, like the peers' code paths."""
    rows, columns = np.divmod(np.arange(batch * ids_per_sample, dtype=np.int64), ids_per_sample)
    return tf.constant(np.stack([rows, columns], axis=1)), tf.constant([batch, ids_per_sample], tf.int64)


class TensorFlowPeer:
    """What both TensorFlow peers do: tensors in, and tf.function around the lookup where the case says so."""

    def batch(self, case: Case, axes: Axes, ids: np.ndarray):
        values = tf.constant(ids)
        if case.form == "dense":
            return values
        indices, shape = _sparse_frame(case.batch, axes.ids_per_sample)
        return tf.SparseTensor(indices, values, shape)

    def lookup(self, case: Case, axes: Axes) -> Lookup | None:
        body = self.dense if case.form == "dense" else self.sparse
        if case.call == "eager":
            return body
        spec = tf.TensorSpec([None], tf.int64)
        if case.form == "sparse":
            spec = tf.SparseTensorSpec([None, axes.ids_per_sample], tf.int64)
        return tf.function(body, input_signature=[spec])


class HpsPeer(TensorFlowPeer):
    """Our ops; the keys are the numbers of the rows, as TensorFlow's are."""

    name = "hps"

    def config(self, data: TableData) -> Path:
        return data.config_path

    def prepare(self, data: TableData) -> None:
        self.config_path = self.config(data)
        self._server = server_resource(self.config_path)
        self._table = lookup_ops.TableRef(MODEL, 0, data.width)

    def dense(self, ids):
        return lookup_ops.lookup(self._server, [ids], [self._table])[0]

    def sparse(self, ids):
        segments = lookup_ops.Segments(ids.values, ids.indices, ids.dense_shape, "indices")
        return lookup_ops.lookup_sparse(self._server, [segments], [self._table], [COMBINER])[0]

    def close(self) -> None:
        self._server = None
        hps.shutdown()


class ScatteredPeer(HpsPeer):
    """Our ops, with keys from all over the range of int64, for information: TensorFlow could not look those up."""

    name = "hps_scattered"

    def config(self, data: TableData) -> Path:
        return data.scattered_config_path

    def batch(self, case: Case, axes: Axes, ids: np.ndarray):
        return super().batch(case, axes, scatter(ids))


class NativePeer(TensorFlowPeer):
    """TensorFlow's own lookups in a variable of the same rows."""

    name = "tensorflow"

    def prepare(self, data: TableData) -> None:
        self._variable = tf.Variable(data.values, trainable=False)

    def dense(self, ids):
        return tf.nn.embedding_lookup(self._variable, ids)

    def sparse(self, ids):
        return tf.nn.embedding_lookup_sparse(self._variable, ids, None, combiner=COMBINER)

    def close(self) -> None:
        self._variable = None


class SessionPeer:
    """hps.ParameterServer: the native session without TensorFlow, for information."""

    name = "session"

    def prepare(self, data: TableData) -> None:
        self._server = hps.ParameterServer(data.config_path)

    def batch(self, case: Case, axes: Axes, ids: np.ndarray) -> np.ndarray:
        return ids

    def lookup(self, case: Case, axes: Axes) -> Lookup | None:
        if case.form != "dense" or case.call != "eager":
            return None
        return lambda ids: self._server.lookup(ids, MODEL, 0)

    def close(self) -> None:
        self._server.close()


PEERS = (HpsPeer, NativePeer, ScatteredPeer, SessionPeer)
