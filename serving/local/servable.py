"""One version of one model, loaded: its signatures, and running them."""


class Servable:
    """A loaded SavedModel.

    Attributes:
        name: the model's name.
        version: its version, an int.
        signature_defs: name → `SignatureDef`, all of saved_model.pb's `serve` meta graph.
    """

    def predict(self, signature_name, inputs, output_names, call):
        """Runs a signature.

        Args:
            signature_name: its name; "" means `serving_default`.
            inputs: input name → NumPy array, whose dtype must be the signature's (object arrays of bytes for strings).
            output_names: the outputs wanted, in any order; empty means all.
            call: the request's `Call`; when it ends early the graph stops.

        Returns:
            The effective signature name and a dict of output name → NumPy array.

        Raises:
            ServingError: with the code and message of the real server.
        """
        raise NotImplementedError
