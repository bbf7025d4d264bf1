"""Lets layers whose names hold dots live on the torch backend, where a parameter's name must not."""

import torch
from keras.src.backend.torch.layer import TorchLayer


class _DotFree(torch.nn.ParameterDict):
    def _key_to_attr(self, key):
        return super()._key_to_attr(key.replace(".", "_"))


def _track_variables(self):
    self._torch_params = _DotFree({variable.path: variable.value for variable in self.variables})


TorchLayer._track_variables = _track_variables
