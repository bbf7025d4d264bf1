"""All models and their versions: which folders are wanted, which are loaded, which of them answers."""


class Models:
    """The models that the server knows; a thread polls their folders."""

    def find(self, name, version=None, label=None):
        """The `Servable` for a request: a version, a label, or the highest version served.

        Raises:
            ServingError: NOT_FOUND "Servable not found for request: …", INVALID_ARGUMENT for an empty name or an unknown label.
        """
        raise NotImplementedError

    def status(self, name, version=None, label=None):
        """List of (version, state, code, message), highest version first, one item where a version or label is given.

        `state` is one of "START", "LOADING", "AVAILABLE", "UNLOADING", "END"; `code` a canonical code's name.

        Raises:
            ServingError: NOT_FOUND for unknown models and versions, INVALID_ARGUMENT for an unknown label.
        """
        raise NotImplementedError

    def reload(self, config):
        """Takes a new `ModelServerConfig` and waits until its models are available.

        Raises:
            ServingError: INVALID_ARGUMENT and FAILED_PRECONDITION for configs that cannot be taken.
        """
        raise NotImplementedError
