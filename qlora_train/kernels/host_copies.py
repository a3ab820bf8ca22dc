"""Copies from the host to a device that the host does not wait for."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the host it goes through page-locked memory, without which a copy waits."""
    if device.type == "cuda" and not tensor.is_cuda and torch.cuda.is_initialized():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
