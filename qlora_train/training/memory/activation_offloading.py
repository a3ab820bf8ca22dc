"""Activation offloading: what autograd saves is in pinned host memory until the backward pass needs it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from qlora_train.utils.host_memory import available_bytes

MIN_BYTES = 1 << 20
"""Smaller tensors stay on the GPU: copying takes longer than they save."""
HOST_RESERVE_BYTES = 1 << 30
"""Host memory left to everything else."""


def offload_activations(model: nn.Module, device: torch.device) -> saved_tensors_hooks:
    """Return the context manager of a forward pass whose saved tensors, except weights and small ones, go to the host.

    Of checkpointed layers these are their inputs. A tensor keeps its memory order: in another one, kernels would round
    differently.

    Raises:
        MemoryError: on saving, if the host has too little memory.
    """
    host = save_on_cpu(pin_memory=device.type == "cuda")

    def pack(tensor: Tensor) -> Any:
        if tensor.nbytes < MIN_BYTES or tensor.device != device:
            return tensor
        available = available_bytes()
        if available < tensor.nbytes + HOST_RESERVE_BYTES:
            raise MemoryError(f"activation offloading: the host has {available / 1e9:.1f} GB left")
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        return order, host.pack_hook(tensor.permute(order))

    def unpack(packed: Any) -> Tensor:
        order, copy = packed
        tensor: Tensor = host.unpack_hook(copy)
        return tensor.permute([order.index(dim) for dim in range(tensor.dim())])

    return ignoring_weights(model, saved_tensors_hooks(pack, unpack))


def ignoring_weights(model: nn.Module, hooks: saved_tensors_hooks) -> saved_tensors_hooks:
    """Return hooks that skip a model's weights and views of them."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in weights else hooks.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        tensor: Tensor = packed if isinstance(packed, Tensor) else hooks.unpack_hook(packed)
        return tensor

    return saved_tensors_hooks(pack, unpack)
