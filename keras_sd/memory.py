"""Memory that was freed, which allocators keep for the process; these let the system have it. Imports no Keras."""

import contextlib
import ctypes
import os

M_ARENA_MAX = -8  # of glibc's malloc.h


def frugal_allocators():
    """Before TensorFlow is imported: it allocates with glibc, not from a pool that keeps the memory of models that were
    given up; and glibc has one heap for all threads, not one for each, all with holes."""
    os.environ.setdefault("TF_ONEDNN_USE_SYSTEM_ALLOCATOR", "1")
    with _glibc() as library:
        library.mallopt(M_ARENA_MAX, 1)


def trim():
    """Gives back what glibc keeps of the memory that was freed."""
    with _glibc() as library:
        library.malloc_trim(0)


@contextlib.contextmanager
def _glibc():
    """The C library; nothing is done where it is another."""
    with contextlib.suppress(OSError, AttributeError):
        yield ctypes.CDLL(None)
