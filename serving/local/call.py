"""One request's life: its deadline, and the one place where it is cancelled."""

import heapq
import itertools
import threading
import time
import weakref

from .errors import ServingError

# What the real server's runtime says.
_MESSAGES = {"DEADLINE_EXCEEDED": "Timed out waiting for notification", "CANCELLED": "Run was cancelled"}


class Call:
    """A request that ends early when its deadline passes or its client goes away.

    Args:
        timeout_seconds: seconds from now, or None for no deadline.

    Attributes:
        deadline: on `time.monotonic`'s clock, or None.
    """

    def __init__(self, timeout_seconds=None):
        self.deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._lock = threading.Lock()
        self._callbacks = []
        self._code = None

    def remaining(self):
        """Seconds to the deadline, never negative; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def ended(self):
        """The code that the request ended early with, "CANCELLED" or "DEADLINE_EXCEEDED"; None while it is wanted."""
        if self._code is None and self.remaining() == 0:
            self.cancel("DEADLINE_EXCEEDED")
        return self._code

    def cancel(self, code="CANCELLED"):
        """Ends the request: every callback runs, once. The first code stands."""
        with self._lock:
            if self._code is not None:
                return
            # A transport that drops a late request calls it cancelled.
            self._code = "DEADLINE_EXCEEDED" if self.remaining() == 0 else code
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_cancel(self, callback):
        """Has `callback()` run when the request ends early, from another thread; at once if it already has."""
        with self._lock:
            if self._code is None:
                self._callbacks.append(callback)
                if self.deadline is not None and len(self._callbacks) == 1:
                    _watch(self)
                return
        callback()

    def check(self):
        """Raises `ServingError` DEADLINE_EXCEEDED or CANCELLED once the request has ended early."""
        code = self.ended()
        if code is not None:
            raise ServingError(code, _MESSAGES[code])


# One thread watches the deadlines of all calls that somebody waits in.
_due = []
_order = itertools.count()
_changed = threading.Condition()
_watcher = None


def _watch(call):
    global _watcher
    with _changed:
        heapq.heappush(_due, (call.deadline, next(_order), weakref.ref(call)))
        if _watcher is None:
            _watcher = threading.Thread(target=_end_late_calls, name="deadlines", daemon=True)
            _watcher.start()
        _changed.notify()


def _end_late_calls():
    while True:
        with _changed:
            wait = _due[0][0] - time.monotonic() if _due else None
            if wait is None or wait > 0:
                _changed.wait(wait)
                continue
            call = heapq.heappop(_due)[2]()
        if call is not None:
            call.ended()
            del call
