"""What the backward pass needs, kept in the host's memory until then."""

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


def activations_on_host(model: nn.Module) -> saved_tensors_hooks:
    """Return a context in which what autograd saves moves to the host, but for the weights, which stay anyway.

    Layers that are computed again save their inputs alone, so that these alone are moved.
    """
    return but_for_weights(model, save_on_cpu(pin_memory=torch.cuda.is_available()))


def but_for_weights(model: nn.Module, hooks: saved_tensors_hooks) -> saved_tensors_hooks:
    """Return hooks that leave a model's weights, and views of them, alone."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in weights else hooks.pack_hook(tensor)

    def unpack(kept: Any) -> torch.Tensor:
        unpacked: torch.Tensor = kept if isinstance(kept, torch.Tensor) else hooks.unpack_hook(kept)
        return unpacked

    return saved_tensors_hooks(pack, unpack)
