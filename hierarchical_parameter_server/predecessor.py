"""SavedModels that the predecessor (hps_tf up to v24.06) exported.

They hold ops with the bare names ``Init`` and ``Lookup``. Other custom-op libraries use such names too, so they are
registered on request only.
"""

from . import _native


def enable_predecessor_ops() -> None:
    """Registers the predecessor's op names in this process; call it before ``tf.saved_model.load``.

    Its lookups use the server of ``hps.Init``. Without one, a model that was exported with a configuration initialises
    the process with it, as the predecessor did.
    """
    _native.predecessor_ops()
