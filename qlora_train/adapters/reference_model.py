"""The reference model of preference training: the base alone, or with the adapter that training began with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.adapters.attach import trainable_state


@contextmanager
def base_model(model: Any) -> Iterator[None]:
    """Switch the adapter off, new embeddings and modules to save included."""
    with model.disable_adapter():
        yield


class InitialAdapter:
    """Puts the adapter as it is now back for a while."""

    def __init__(self, model: Any) -> None:
        self._initial = {name: parameter.detach().clone() for name, parameter in trainable_state(model).items()}

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Give every trained tensor its initial values; gradients must be off."""
        parameters = trainable_state(model)
        trained = {name: parameter.data for name, parameter in parameters.items()}
        _set_values(parameters, self._initial)
        try:
            yield
        finally:
            _set_values(parameters, trained)


def _set_values(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.data = values[name]
    torch.clear_autocast_cache()  # an outer autocast keeps each parameter's rounded copy, of the values before
