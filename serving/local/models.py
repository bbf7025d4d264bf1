"""All models and their versions: which folders are wanted, which are loaded, which of them answers.

One thread does it all, as in the real server by default: it polls the base paths, loads new versions, and unloads old
ones once a wanted one answers. What it cannot load never disturbs what is served.
"""

import gc
import logging
import threading
import time

from tensorflow_serving.config import model_server_config_pb2

from . import versions
from .errors import ServingError, from_exception


class Models:
    """The models that the server knows.

    Args:
        load: (name, version, path) → a `Servable` that is ready to answer; raises `ServingError`.
        poll_seconds: between two looks at the base paths; 0 looks once, a negative number never.
        max_retries: how often a version that cannot be loaded is tried again, besides whenever its files change.
        retry_seconds: between two such tries.
        labels_for_unavailable: whether a new label may point at a version that is not served yet.
        stopping: an event that ends the polling and all waiting, if `stop` does not.
    """

    def __init__(
        self, load, poll_seconds=1, max_retries=5, retry_seconds=60, labels_for_unavailable=False, stopping=None
    ):
        self._load = load
        self._poll_seconds, self._max_retries, self._retry_seconds = poll_seconds, max_retries, retry_seconds
        self._labels_for_unavailable = labels_for_unavailable
        self._configs = {}  # name → ModelConfig
        self._labels = {}  # name → label → version
        self._versions = {}  # name → version → Version, every one ever seen
        self._wanted = {}  # name → version → path, as of the last look
        self._looked = False
        self._complaints = {}  # name → the last thing wrong with its base path, logged once
        self._changed = threading.Condition()  # guards all of the above
        self._reloading = threading.Lock()
        self._wake = threading.Event()
        self._stopped = stopping or threading.Event()
        self._thread = threading.Thread(target=self._manage, name="models", daemon=True)

    # Requests

    def find(self, name, version=None, label=None):
        """The `Servable` for a request: of a version, of a label's version, or of the highest version served.

        Raises:
            ServingError: NOT_FOUND "Servable not found for request: …"; INVALID_ARGUMENT for an empty name or an
                unknown label.
        """
        if not name:
            raise ServingError("INVALID_ARGUMENT", "ModelSpec has no name specified.")
        with self._changed:
            if label is not None:
                version = self._version_of(name, label)
            entries = self._versions.get(name, {})
            served = [number for number, entry in entries.items() if entry.state == "AVAILABLE"]
            if version is None and served:
                version = max(served)
            if version in served:
                return entries[version].servable
        request = f"Latest({name})" if version is None else f"Specific({name}, {version})"
        raise ServingError("NOT_FOUND", f"Servable not found for request: {request}")

    def status(self, name, version=None, label=None):
        """List of (version, state, code, message), highest version first; one item where a version or label is given.

        `state` is one of "START", "LOADING", "AVAILABLE", "UNLOADING", "END"; `code` a canonical code's name: that of
        the last error while a version that cannot be loaded is tried again (LOADING) and after the last try (END).

        Raises:
            ServingError: NOT_FOUND for unknown models and versions, INVALID_ARGUMENT for an unknown label.
        """
        with self._changed:
            if label is not None:
                version = self._version_of(name, label)
            entries = self._versions.get(name, {})
            if version is None and not entries:
                raise ServingError("NOT_FOUND", f"Could not find any versions of model {name}")
            if version is not None and version not in entries:
                raise ServingError("NOT_FOUND", f"Could not find version {version} of model {name}")
            numbers = sorted(entries, reverse=True) if version is None else [version]
            return [(number, entries[number].state, *entries[number].status()) for number in numbers]

    def _version_of(self, name, label):
        try:
            return self._labels[name][label]
        except KeyError:
            raise ServingError("INVALID_ARGUMENT", f"Unrecognized servable version label: {label}") from None

    # Configuration

    def start(self, config):
        """Loads the models of a `ModelServerConfig` and waits until each has a version that answers, or none that can.

        Raises:
            ServingError: as `reload`; CANCELLED if `stop` is called meanwhile.
        """
        names = self._configure(config)
        self._thread.start()
        self._await(names)

    def reload(self, config, call=None):
        """Takes a new `ModelServerConfig`; waits until the models that are new have a version that answers.

        Args:
            config: replaces the one before; models that it does not name are unloaded.
            call: the request's `Call`, if one waits.

        Raises:
            ServingError: INVALID_ARGUMENT and FAILED_PRECONDITION for a config that cannot be taken, which then changes
                nothing; UNKNOWN if a new model cannot be loaded; DEADLINE_EXCEEDED, CANCELLED.
        """
        with self._reloading:
            names = self._configure(config)
        self._wake.set()
        self._await(names, call)

    def stop(self):
        """Ends polling, after the load that may be under way. What is served stays."""
        self._stopped.set()
        self._wake.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.ident:
            self._thread.join()

    def _configure(self, config):
        """Takes a config over; returns the names of the models that are new."""
        if config.WhichOneof("config") != "model_config_list" and (config.ByteSize() or self._configs):
            raise ServingError(
                "FAILED_PRECONDITION",
                "Cannot transition to requested config. It is only legal to transition from one ModelConfigList to "
                "another.",
            )
        configs = {}
        for model in config.model_config_list.config:
            _check_config(model)
            if model.name in configs:
                raise ServingError(
                    "INVALID_ARGUMENT", f"Illegal to list model {model.name} multiple times in config list"
                )
            configs[model.name] = model
        with self._changed:
            labels = {name: self._checked_labels(model) for name, model in configs.items()}
            new = set(configs) - set(self._configs)
            self._configs, self._labels = configs, labels
        return new

    def _checked_labels(self, model):
        for label, version in model.version_labels.items():
            entry = self._versions.get(model.name, {}).get(version)
            unused = self._labels.get(model.name, {}).get(label, version) == version
            if (entry is None or entry.state != "AVAILABLE") and not (self._labels_for_unavailable and unused):
                raise ServingError(
                    "FAILED_PRECONDITION",
                    f"Request to assign label to version {version} of model {model.name}, which is not currently "
                    "available for inference",
                )
        return dict(model.version_labels)

    def _await(self, names, call=None):
        def settled(name):
            entries = [self._versions.get(name, {}).get(version) for version in self._wanted.get(name, {})]
            states = {entry.state if entry else "START" for entry in entries}
            served = any(entry.state == "AVAILABLE" for entry in self._versions.get(name, {}).values())
            return served or name not in self._configs or states == {"END"}

        if call:
            call.on_cancel(self._notify)
        with self._changed:
            while not all(map(settled, names)):
                if self._stopped.is_set():
                    raise ServingError("CANCELLED", "The server is shutting down")
                if call:
                    call.check()
                self._changed.wait(1)
            failed = []
            for name in sorted(names & set(self._configs)):
                entries = self._versions.get(name, {})
                if not any(entry.state == "AVAILABLE" for entry in entries.values()):
                    failed += [
                        f"{{{{name: {name} version: {version}}} due to error: {entries[version].error}}}"
                        for version in self._wanted[name]
                    ]
        if failed:
            raise ServingError("UNKNOWN", f"{len(failed)} servable(s) did not become available: {', '.join(failed)}")

    def _notify(self):
        with self._changed:
            self._changed.notify_all()

    # The thread

    def _manage(self):
        next_look = time.monotonic() if self._poll_seconds >= 0 else float("inf")
        while not self._stopped.is_set():
            try:
                reloaded = self._wake.is_set()
                self._wake.clear()
                now = time.monotonic()
                if reloaded or now >= next_look:
                    self._look()
                    next_look = now + self._poll_seconds if self._poll_seconds > 0 else float("inf")
                self._settle()
                while self._step() and not self._stopped.is_set():
                    pass
                self._notify()
            except Exception:  # whatever it is, what is served stays served and the next look may go better
                logging.exception("polling the models failed")
            pending = versions.SETTLE_SECONDS / 2 if self._pending() else 1
            self._wake.wait(max(0.01, min(pending, next_look - time.monotonic())))

    def _look(self):
        """Finds out which versions are wanted."""
        for name, config in list(self._configs.items()):
            try:
                found = versions.find(config.base_path)
            except OSError:
                # Perhaps gone only for a moment: what is served stays.
                self._complain(name, f"Could not find base path {config.base_path} for servable {name}")
                continue
            wanted = versions.wanted(config.model_version_policy, found)
            self._complain(
                name, "" if wanted else f"No versions of servable {name} found under base path {config.base_path}"
            )
            with self._changed:
                before, self._wanted[name] = self._wanted.get(name, {}), wanted
                entries = self._versions.setdefault(name, {})
                for number, path in wanted.items():
                    entry = entries.get(number)
                    returns = entry and entry.state == "END" and (entry.error is None or number not in before)
                    moved = entry and entry.servable is None and entry.path != path
                    if entry is None or returns or moved:
                        entries[number] = versions.Version(path, rested=not self._looked)
        with self._changed:
            for name in set(self._wanted) - set(self._configs):
                self._wanted[name] = {}
        self._looked = True

    def _complain(self, name, message):
        if message and self._complaints.get(name) != message:
            logging.warning("%s", message)
        self._complaints[name] = message

    def _settle(self):
        """Notes which folders that wait to be loaded have changed, and which have come to rest."""
        for _, _, entry in self._unloaded():
            entry.look()

    def _unloaded(self):
        """Wanted versions that are not served, the highest of each model first."""
        with self._changed:
            return [
                (name, number, self._versions[name][number])
                for name, wanted in self._wanted.items()
                for number in sorted(wanted, reverse=True)
                if self._versions[name][number].state not in ("AVAILABLE", "UNLOADING")
            ]

    def _pending(self):
        return bool(self._unloaded()) or any(
            entry.state == "UNLOADING" for entries in self._versions.values() for entry in entries.values()
        )

    def _step(self):
        """Does the next thing there is to do, and says whether there was one."""
        if self._unload():
            return True
        for name, number, entry in self._unloaded():
            if entry.due():
                self._try_to_load(name, number, entry)
                self._look_again()
                return True
        return False

    def _look_again(self):
        # A load may have taken long: the folder may be gone by now, or a higher one there.
        if self._poll_seconds > 0:
            self._look()
            self._settle()

    def _try_to_load(self, name, number, entry):
        with self._changed:
            entry.state = "LOADING"
        logging.info("Loading servable version {name: %s version: %d}", name, number)
        entry.tries += 1
        try:
            servable = self._load(name, number, entry.path)
        except Exception as error:
            error = from_exception(error)
            error = ServingError(error.code, error.message)  # without the traceback, which holds what was loaded
            logging.error("Loading servable: {name: %s version: %d} failed: %s", name, number, error)
            with self._changed:
                entry.error = error
                if entry.tries > self._max_retries:
                    entry.state = "END"
            entry.retry_at = time.monotonic() + self._retry_seconds
            return
        with self._changed:
            entry.servable, entry.error, entry.state = servable, None, "AVAILABLE"
            self._changed.notify_all()
        logging.info("Successfully loaded servable version {name: %s version: %d}", name, number)

    def _unload(self):
        """Retires versions that are no longer wanted, where a wanted one answers or none is wanted at all."""
        retired = ended = False
        with self._changed:
            for name, entries in self._versions.items():
                wanted = self._wanted.get(name, {})
                replaced = not wanted or any(entries[number].state == "AVAILABLE" for number in wanted)
                for number, entry in entries.items():
                    if number not in wanted and entry.state in ("START", "LOADING"):
                        entry.state = "END"  # its folder went away, or a higher one came, before it could be loaded
                    elif number not in wanted and entry.state == "AVAILABLE" and replaced:
                        logging.info("Unloading servable version {name: %s version: %d}", name, number)
                        entry.unload()
                        retired = True
                    elif entry.state == "UNLOADING" and entry.servable() is None:
                        entry.state, entry.servable = "END", None
                        ended = True
        if ended:
            gc.collect()  # functions and variables refer to each other in circles
        return retired or ended


def _check_config(model):
    platform = model.model_platform
    if model.model_type:
        if platform:
            raise ServingError(
                "INVALID_ARGUMENT",
                "Illegal setting both ModelServerConfig::model_type (deprecated) and "
                "ModelServerConfig::model_platform.",
            )
        platform = model_server_config_pb2.ModelType.Name(model.model_type).lower()
    if not platform:
        raise ServingError(
            "INVALID_ARGUMENT",
            "Illegal setting neither ModelServerConfig::model_type (deprecated) nor ModelServerConfig::model_platform.",
        )
    if platform != "tensorflow":
        raise ServingError("INVALID_ARGUMENT", f"Model {model.name} requests unsupported platform {platform}")
