"""A small DLRM-style ranker with native Keras embeddings, and its training.

Each id feature has a table of its own width; a dense layer brings its row to a common width. All pairs of these
vectors and the output of the bottom network are multiplied (dot interaction), and the top network turns the products
into a probability.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from movielens.data import MAX_GENRES, MULTI_HOT, Ratings

keras = tf.keras
layers = tf.keras.layers

WIDTHS = {
    "user": 32,
    "item": 64,
    "occupation": 8,
    "zip": 8,
    "hour": 8,
    "genres": 16,
    "item_x_hour": 8,
    "user_x_genres": 16,
}
COMMON_WIDTH = 16


def build(rows: dict[str, int]) -> keras.Model:
    """The model; `rows` gives the size of each table. Inputs as in `data.Ratings`, output [n, 1] in 0 .. 1."""
    inputs = {name: keras.Input((MAX_GENRES if name in MULTI_HOT else 1,), dtype="int64", name=name) for name in WIDTHS}
    inputs["profile"] = keras.Input((5,), name="profile")
    vectors = [layers.Dense(COMMON_WIDTH, name="bottom_2")(_hidden(32, "bottom_1")(inputs["profile"]))]
    for name, width in WIDTHS.items():
        many = name in MULTI_HOT
        embedding = layers.Embedding(rows[name], width, mask_zero=many, name=f"{name}_embedding")
        pool = layers.GlobalAveragePooling1D(name=f"{name}_mean") if many else layers.Flatten(name=f"{name}_row")
        vectors.append(layers.Dense(COMMON_WIDTH, name=f"{name}_projection")(pool(embedding(inputs[name]))))
    stacked = layers.Reshape((len(vectors), COMMON_WIDTH))(layers.Concatenate()(vectors))
    pairs = layers.Flatten()(layers.Dot(axes=2, name="interaction")([stacked, stacked]))
    hidden = _hidden(64, "top_1")(layers.Concatenate()([*vectors, pairs]))
    output = layers.Dense(1, activation="sigmoid", name="probability")(_hidden(32, "top_2")(hidden))
    return keras.Model(inputs, output, name="movielens")


def _hidden(units: int, name: str) -> keras.layers.Layer:
    return layers.Dense(units, activation="relu", name=name)


def _variable(variable: object) -> tf.Variable:
    """TensorFlow's variable itself; Keras 3 wraps it."""
    return variable if isinstance(variable, tf.Variable) else variable.value


class Trainer:
    """Trains with Adagrad on the embedding rows of a batch alone, and Adam on the dense layers.

    Keras' own optimizers touch every row of every table in each step, which would take most of the time here.
    """

    def __init__(self, model: keras.Model, rows_learning_rate: float = 0.1) -> None:
        self._model = model
        self._rate = rows_learning_rate
        tables = [layer.embeddings for layer in model.layers if isinstance(layer, layers.Embedding)]
        self._tables = [_variable(table) for table in tables]
        self._sums = [tf.Variable(tf.fill(table.shape, 0.1)) for table in self._tables]
        wide = {id(table) for table in tables}
        self._dense = [variable for variable in model.trainable_variables if id(variable) not in wide]
        self._adam = keras.optimizers.Adam(0.002)
        self._adam.build(self._dense)
        self._loss = keras.losses.BinaryCrossentropy()

    @tf.function
    def _step(self, inputs: dict[str, tf.Tensor], labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = self._loss(labels[:, None], self._model(inputs, training=True))
        gradients = tape.gradient(loss, [*self._tables, *map(_variable, self._dense)])
        count = len(self._tables)
        for table, sums, rows in zip(self._tables, self._sums, gradients[:count], strict=True):
            tf.raw_ops.ResourceSparseApplyAdagradV2(
                var=table.handle,
                accum=sums.handle,
                lr=self._rate,
                epsilon=1e-7,
                grad=rows.values,
                indices=rows.indices,
            )
        self._adam.apply_gradients(zip(gradients[count:], self._dense, strict=True))
        return loss

    def epoch(self, ratings: Ratings, batch_size: int, progress: Callable[[int, str], None]) -> list[float]:
        """One pass over the ratings in random order.

        Args:
            progress: called as `progress(ratings_done, note)` after each batch.

        Returns:
            The loss of each batch.
        """
        order = np.random.default_rng(len(ratings)).permutation(len(ratings))
        losses: list[float] = []
        for start in range(0, len(ratings) - batch_size + 1, batch_size):
            batch = ratings.take(order[start : start + batch_size])
            losses.append(float(self._step(batch.inputs, batch.labels)))
            progress(start + batch_size, f"loss {np.mean(losses):.4f}")
        progress(len(ratings), f"loss {np.mean(losses):.4f}")
        return losses


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a positive scores above a negative; ties count half."""
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]
    positives = labels.sum()
    return float((ranks[labels > 0].sum() - positives * (positives + 1) / 2) / (positives * (len(labels) - positives)))
