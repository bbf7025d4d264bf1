"""Version folders: which of them are wanted, when one can be loaded, and what is known of each."""

import os
import re
import time
import weakref

# A folder that appears or changes under a running server may still be copied: it is loaded once it rested this long.
SETTLE_SECONDS = 0.5


def find(base_path):
    """The version folders under a base path, those whose whole name is an integer: number → path.

    Raises:
        OSError: if there is no such path.
    """
    names = sorted((entry.name for entry in os.scandir(base_path) if entry.is_dir()), reverse=True)
    return {int(name): os.path.join(base_path, name) for name in names if _is_number(name)}


def wanted(policy, found):
    """What a `ServableVersionPolicy` asks for, of the folders found: number → path."""
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return found
    if choice == "specific":
        return {number: found[number] for number in policy.specific.versions if number in found}
    return {number: found[number] for number in sorted(found)[-max(1, policy.latest.num_versions) :]}


class Version:
    """What is known of one version of a model, once its folder was seen.

    Args:
        path: its folder.
        rested: whether the folder passes for complete, for want of an earlier look to compare it with.

    Attributes:
        state: "START", "LOADING", "AVAILABLE", "UNLOADING" or "END".
        servable: what answers while it is AVAILABLE; while UNLOADING a weak reference, as requests still hold it.
        error: the `ServingError` of the last try to load it, if that failed.
        tries: how many tries have failed since its files last changed.
        retry_at: when to try next, on `time.monotonic`'s clock.
    """

    def __init__(self, path, rested):
        self.path = path
        self.state, self.servable, self.error = "START", None, None
        self.tries, self.retry_at = 0, 0.0
        self._files = _files(path) if rested else None
        self._changed_at = 0.0

    def status(self):
        """The code and message to show."""
        return (self.error.code, self.error.message) if self.error else ("OK", "")

    def look(self):
        """Looks at the folder: if its files have changed, earlier tries to load it no longer count."""
        files = _files(self.path)
        if files != self._files:
            self._files, self._changed_at = files, time.monotonic()
            self.tries, self.retry_at = 0, 0.0

    def due(self):
        """Whether it is time to load it."""
        now = time.monotonic()
        rests = now >= self._changed_at + SETTLE_SECONDS
        return rests and (self.tries == 0 or (self.state != "END" and now >= self.retry_at))

    def unload(self):
        self.state, self.servable = "UNLOADING", weakref.ref(self.servable)


def _files(path):
    """What changes when a file under the path is added, written or removed."""
    found = []
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                info = os.stat(os.path.join(folder, name))
            except OSError:  # removed just now
                continue
            found.append((folder, name, info.st_size, info.st_mtime_ns))
    return sorted(found)


def _is_number(name):
    return re.fullmatch("-?[0-9]+", name) is not None and -(2**63) <= int(name) < 2**63
