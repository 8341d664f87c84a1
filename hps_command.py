"""The `hps` command; also `python -m hps_command`.

Outside of the package, because importing that imports TensorFlow: slow, and its native libraries greet on stderr
whatever their log level is. Only `hps convert` needs it, and then without the greeting.
"""

import contextlib
import os
import sys
import tempfile


def main() -> int:
    if sys.argv[1:2] == ["convert"] and not {"-h", "--help"} & set(sys.argv):
        _import_tensorflow()
    else:
        os.environ["HPS_TENSORFLOW"] = "off"
    from hierarchical_parameter_server.cli import main as run

    return run()


def _import_tensorflow() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _stderr_held_back(), contextlib.suppress(ModuleNotFoundError):  # the command says what it needs
        import tensorflow as tf

        tf.zeros(())  # what it says about GPUs comes with the first tensor


@contextlib.contextmanager
def _stderr_held_back():
    """Descriptor 2 goes to a file, which is shown if something fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


if __name__ == "__main__":
    sys.exit(main())
