"""One error type for everything a request can meet: a canonical status code and a message."""

import re

# The canonical codes of gRPC, Abseil and TensorFlow; the numbers are the ones on the wire.
CODES = {
    "OK": 0,
    "CANCELLED": 1,
    "UNKNOWN": 2,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "OUT_OF_RANGE": 11,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "DATA_LOSS": 15,
    "UNAUTHENTICATED": 16,
}
_NAMES = {number: name for name, number in CODES.items()}


class ServingError(Exception):
    """A request that failed.

    Args:
        code: name of a canonical code, such as "NOT_FOUND".
        message: what the client is told.
    """

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code
        self.message = message


def from_exception(error):
    """Any exception as a `ServingError`: TensorFlow's with the runtime's code and message, others as INTERNAL."""
    if isinstance(error, ServingError):
        return error
    number = getattr(error, "error_code", None)  # tf.errors.OpError, without importing TensorFlow here
    if number in _NAMES:
        return ServingError(_NAMES[number], _runtime_message(error.message))
    return ServingError("INTERNAL", f"{type(error).__name__}: {error}")


def _runtime_message(message):
    """TensorFlow's message as the C++ runtime wrote it, without what eager execution and Python put around it."""
    message = re.sub(
        r"^Graph execution error:\n\n(Detected at node .*\n(<stack.*\n|  File .*\n|    .*\n|\n)*)*", "", message
    )
    message = re.sub(r"^\{\{function_node \S+?\}\} ", "", message)
    return re.sub(r"\s*\[Op:[^\]]*\]( name: .*)?$", "", message)
