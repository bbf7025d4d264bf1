"""A local server that a client cannot tell from `tensorflow_model_server`: gRPC and REST over SavedModels."""
