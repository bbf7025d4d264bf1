"""One request's life: its deadline, and the one place where it is cancelled."""

import threading
import time

from .errors import ServingError


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

    @property
    def ended(self):
        """The code that the request ended early with, "CANCELLED" or "DEADLINE_EXCEEDED"; None while it is wanted."""
        if self._code is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.cancel("DEADLINE_EXCEEDED")
        return self._code

    def cancel(self, code="CANCELLED"):
        """Ends the request: every callback runs, once. The first code stands."""
        with self._lock:
            if self._code is not None:
                return
            self._code = code
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_cancel(self, callback):
        """Has `callback()` run when the request is cancelled; at once if it already is."""
        with self._lock:
            if self._code is None:
                self._callbacks.append(callback)
                return
        callback()

    def check(self):
        """Raises `ServingError` DEADLINE_EXCEEDED or CANCELLED once the request has ended."""
        code = self.ended
        if code is not None:
            raise ServingError(code, _MESSAGES[code])


_MESSAGES = {
    "DEADLINE_EXCEEDED": "Timed out waiting for notification",  # DirectSession's own words
    "CANCELLED": "RunManyGraphs operation was cancelled",
}
