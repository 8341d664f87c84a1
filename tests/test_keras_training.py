"""Models with HPS layers train: the rows stay as they are, everything above them learns.

Everything here holds for both Kerases: test_legacy_keras.py runs this file with TF_USE_LEGACY_KERAS=1.
"""

import json

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROWS, run_python

import hierarchical_parameter_server as hps

keras = tf.keras
LEGACY = not hasattr(keras, "ops")


def click_model(policy=None):
    """Dense and sparse ids -> the probability of a click."""
    ids = keras.Input((3,), dtype="int64", name="ids")
    padded = keras.Input((5,), dtype="int64", name="padded")
    rows = hps.LookupLayer("main", 2, 16, dtype=policy)(ids)
    pooled = hps.SparseLookupLayer("main", 1, 7, padding_value=-1, dtype=policy)(padded, combiner="sum")
    both = keras.layers.Concatenate(dtype=policy)([keras.layers.Flatten(dtype=policy)(rows), pooled])
    hidden = keras.layers.Dense(8, activation="relu", dtype=policy)(both)
    return keras.Model([ids, padded], keras.layers.Dense(1, activation="sigmoid", dtype="float32")(hidden))


def click_data(rng, samples=256):
    ids = rng.integers(0, ROWS, (samples, 3))
    padded = rng.integers(-1, ROWS, (samples, 5))
    return [ids, padded], (ids[:, 0] % 2).astype("f4")[:, None]


@pytest.mark.parametrize("policy", [None, "mixed_bfloat16"])
def test_fit(tables, rng, policy):
    keras.utils.set_random_seed(3)
    model = click_model(policy)
    assert len(model.trainable_weights) == 4 and len(model.non_trainable_weights) == 0
    before = [weights.copy() for weights in model.get_weights()]
    model.compile("adam", "binary_crossentropy")
    inputs, labels = click_data(rng)
    losses = model.fit(inputs, labels, batch_size=32, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert not any(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    np.testing.assert_array_equal(  # the rows did not move
        hps.LookupLayer("main", 2, 16)(np.arange(ROWS)), tables.rows["w16"]
    )
    assert model.predict(inputs, verbose=0).shape == (256, 1)
    assert np.isfinite(model.evaluate(inputs, labels, verbose=0))


def test_fit_equals_frozen_native_embeddings(tables, rng):
    """The same start and the same batches give the same model as a frozen Keras Embedding."""
    inputs, labels = click_data(rng, 64)
    histories = []
    for native in (False, True):
        keras.utils.set_random_seed(5)
        ids = keras.Input((3,), dtype="int64")
        layer = keras.layers.Embedding(ROWS, 16) if native else hps.LookupLayer("main", 2, 16)
        rows = layer(ids)
        if native:
            layer.set_weights([tables.rows["w16"]])
            layer.trainable = False
        keras.utils.set_random_seed(5)
        outputs = keras.layers.Dense(1, kernel_initializer="ones")(keras.layers.Flatten()(rows))
        model = keras.Model(ids, outputs)
        model.compile("sgd", "mse", jit_compile=False)
        model.fit(inputs[0], labels, batch_size=16, epochs=2, shuffle=False, verbose=0)
        histories.append(model.get_weights()[-2:])
    np.testing.assert_allclose(histories[0][0], histories[1][0], rtol=1e-5, atol=1e-6)


def test_fit_of_sparse_batches(tables, rng):
    """A dataset of SparseTensors with weights."""
    ids = keras.Input((ROWS,), dtype="int64", sparse=True)
    weights = keras.Input((ROWS,), sparse=True)
    pooled = hps.SparseLookupLayer("main", 2, 16)(ids, weights, combiner="mean")
    model = keras.Model([ids, weights], keras.layers.Dense(1)(pooled))
    model.compile("adam", "mse")

    def batch(seed):
        dense = np.random.default_rng(seed).integers(0, 2, (8, ROWS)) * np.arange(ROWS)
        sparse = tf.sparse.from_dense(dense)
        return (sparse, sparse.with_values(tf.ones_like(sparse.values, tf.float32))), tf.ones([8, 1])

    batches = [batch(seed) for seed in range(2)]
    dataset = tf.data.Dataset.from_tensors(batches[0]).concatenate(tf.data.Dataset.from_tensors(batches[1]))
    history = model.fit(dataset, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert model.predict(dataset, verbose=0).shape == (16, 1)


def test_trainable_weights_of_the_ids(tables):
    """A model that learns how much each position counts: gradients pass through sp_weights."""

    class Positions(keras.Model):
        def __init__(self):
            super().__init__()
            self.pool = hps.SparseLookupLayer("main", 2, 16)
            self.weight = self.add_weight(name="weight", shape=(1, 3), initializer="ones")

        def call(self, ids):
            weights = tf.tile(tf.convert_to_tensor(self.weight), [tf.shape(ids)[0], 1])
            return tf.reduce_sum(self.pool(ids, weights, combiner="sum"), axis=1)

    model = Positions()
    model.compile("sgd", "mse")
    ids = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    history = model.fit(ids, np.array([1.0, 2.0, 3.0]), epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert not np.array_equal(model.get_weights()[0], np.ones((1, 3)))


def test_xla_is_kept_away_from_the_lookup(tables, rng):
    """jit_compile="auto" never compiles these models; jit_compile=True of Keras 3 falls back with a warning."""
    model = click_model()
    inputs, labels = click_data(rng, 32)
    if LEGACY:
        model.compile("sgd", "mse", jit_compile=True)
        with pytest.raises(tf.errors.UnimplementedError, match="compiled by XLA"):
            model.fit(inputs, labels, verbose=0)
        return
    model.compile("sgd", "mse", jit_compile="auto")
    assert model.jit_compile is False
    with pytest.warns(UserWarning, match="do not support `jit_compile`|jit_compile"):
        model.compile("sgd", "mse", jit_compile=True)
    model.fit(inputs, labels, verbose=0)


MIRRORED = """
    import sys
    import numpy as np, tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    import hierarchical_parameter_server as hps
    keras = tf.keras
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    batch = np.arange(24).reshape(8, 3)
    with strategy.scope():
        assert hps.Init(ps_config_file=sys.argv[1], global_batch_size=8) == "OK"
    for config in ("", sys.argv[1]):  # the server of Init, and one of the layers' own
        with strategy.scope():
            ids = keras.Input((3,), dtype="int64")
            layer = hps.LookupLayer("main", 2, 16, ps_config_file=config, global_batch_size=8)
            pool = hps.SparseLookupLayer("main", 2, 16, ps_config_file=config)
            both = keras.layers.Concatenate()([keras.layers.Flatten()(layer(ids)), pool(ids)])
            model = keras.Model(ids, keras.layers.Dense(1)(both))
            model.compile("sgd", "mse")
        assert model.predict(batch, batch_size=8, verbose=0).shape == (8, 1)
        losses = model.fit(batch, np.ones((8, 1)), batch_size=8, epochs=3, verbose=0).history["loss"]
        assert losses[-1] < losses[0]

        @tf.function
        def step():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            ids = tf.fill([4], tf.cast(replica, tf.int64) + 5)
            return layer(ids), pool(ids[:, tf.newaxis]), pool(tf.sparse.from_dense([[1, 0, 2], [0, 3, 0]]))

        rows, pooled, sparse = (strategy.experimental_local_results(values) for values in strategy.run(step))
        for replica in range(2):
            expected = np.tile(layer(np.array([5 + replica])), (4, 1))
            assert np.array_equal(rows[replica], expected) and np.array_equal(pooled[replica], expected)
            assert sparse[replica].shape == (2, 16)
        assert len(hps.stats()["servers"]) == 1
    print("mirrored")
"""


def test_mirrored_strategy(disk, tmp_path):
    """Two replicas of one process share the server."""
    assert "mirrored" in run_python(MIRRORED, disk.config, cwd=tmp_path).stdout


SCRIPT = """
    # As users of the predecessor wrote it: layers first, then Init, numpy ids, everything by keyword.
    import json, sys
    import numpy as np, tensorflow as tf
    import hierarchical_parameter_server as hps

    class InferenceModel(tf.keras.models.Model):
        def __init__(self):
            super().__init__()
            self.lookup_layer = hps.LookupLayer(
                model_name="main", table_id=2, emb_vec_size=16, emb_vec_dtype=np.float32)
            self.sparse_lookup_layer = hps.SparseLookupLayer(
                model_name="main", table_id=1, emb_vec_size=7, emb_vec_dtype=tf.float32,
                ps_config_file="", global_batch_size=1024)

        def call(self, inputs):
            rows = self.lookup_layer(inputs[0], max_norm=tf.constant(2.0))
            pooled = self.sparse_lookup_layer(sp_ids=inputs[1], sp_weights=None, combiner="mean")
            return tf.reduce_sum(rows, axis=[1, 2]) + tf.reduce_sum(pooled, axis=1)

    model = InferenceModel()
    status = hps.Init(global_batch_size=1024, ps_config_file=sys.argv[1])
    print("Status:", status, status.numpy())
    ids = np.arange(6, dtype=np.int32).reshape(2, 3)
    sparse = tf.sparse.from_dense(np.array([[1, 0, 2], [0, 3, 0]]))
    traced = tf.function(model)([tf.constant(ids), sparse])
    assert np.allclose(model([tf.constant(ids), sparse]), traced)
    model.summary()
    tf.saved_model.save(tf.Module(), "nothing")
    print("done", traced.numpy().tolist())
"""


def test_a_script_of_the_predecessor(disk, tmp_path):
    output = run_python(SCRIPT, disk.config, cwd=tmp_path).stdout
    assert "b'OK'" in output
    clipped = tf.nn.embedding_lookup(disk.rows["w16"], [[0, 1, 2], [3, 4, 5]], max_norm=2.0).numpy().sum((1, 2))
    pooled = [(disk.rows["w7"][1] + disk.rows["w7"][2]).sum() / 2, disk.rows["w7"][3].sum()]
    actual = json.loads(output.split("done", 1)[1])
    np.testing.assert_allclose(actual, clipped + pooled, rtol=1e-4, atol=1e-4)
