"""What the layers have in common: the server they ask, no weights of their own, and how Keras is to treat them."""

from __future__ import annotations

import tensorflow as tf

from .layer_arguments import check_model_name
from .resource import server_resource


class ServerLayer(tf.keras.layers.Layer):
    """A layer that looks up rows of one model.

    Args:
        model_name: name of the model in ps.json.
        ps_config_file: configuration of the server; "": the server of ``hps.Init``, looked for at the first lookup.
        **kwargs: of keras.layers.Layer.
    """

    def __init__(self, model_name, ps_config_file, **kwargs):
        kwargs.setdefault("autocast", False)  # ids, weights and max_norm keep their types under mixed precision
        super().__init__(**kwargs)
        self.supports_jit = False  # the lookup ops run outside XLA
        self.model_name = check_model_name(model_name)
        self.ps_config_file = str(ps_config_file or "")
        self._server = server_resource(self.ps_config_file)
        self.built = True  # there is nothing to build, so ids of unknown rank are no hindrance

    def compute_output_spec(self, *args, **kwargs):
        """Traces ``call``, so that Keras 3, too, refuses wrong ids when the model is built."""
        return super(tf.keras.layers.Layer, self).compute_output_spec(*args, **kwargs)

    def get_config(self):
        return {**super().get_config(), "model_name": self.model_name, "ps_config_file": self.ps_config_file}
