"""Exceptions of the parameter server outside TensorFlow graphs.

Each is named after its status code and is also the Python built-in that fits, so ``except ValueError`` works. Inside
TensorFlow ops the same failures arrive as ``tf.errors`` of the same names.
"""


class HpsError(Exception):
    """Base of all errors of this package."""


class InvalidArgumentError(HpsError, ValueError):
    """A value is wrong whatever the state of the system."""


class NotFoundError(HpsError, LookupError):
    """A model, table, file or database that was named does not exist."""


class AlreadyExistsError(HpsError, ValueError):
    """The name is taken."""


class FailedPreconditionError(HpsError, RuntimeError):
    """The system is in the wrong state for the call."""


class OutOfRangeError(HpsError, ValueError):
    """A key or index lies outside what the configuration allows."""


class ResourceExhaustedError(HpsError, MemoryError):
    """Memory, disk or a pool is used up."""


class UnavailableError(HpsError, ConnectionError):
    """A server or lock that may come back; retry with back-off."""


class DeadlineExceededError(HpsError, TimeoutError):
    """Not done in time."""


class CancelledError(HpsError):
    """The caller gave up."""


class DataLossError(HpsError, OSError):
    """Stored data is damaged or truncated."""


class UnimplementedError(HpsError, NotImplementedError):
    """Known, but not built."""


class InternalError(HpsError, RuntimeError):
    """A broken invariant of the package; please report it."""
