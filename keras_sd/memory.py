"""Memory that was freed, which glibc's allocator keeps for the process. Imports no Keras."""

import contextlib
import ctypes

M_ARENA_MAX = -8  # of glibc's malloc.h


def one_heap():
    """Lets all threads share one heap from now on: with one for each, all of them have holes."""
    with _glibc() as library:
        library.mallopt(M_ARENA_MAX, 1)


def trim():
    """Gives what was freed back to the system."""
    with _glibc() as library:
        library.malloc_trim(0)


@contextlib.contextmanager
def _glibc():
    """The C library; nothing is done where it is another."""
    with contextlib.suppress(OSError, AttributeError):
        yield ctypes.CDLL(None)
