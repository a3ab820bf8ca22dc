"""Copies from the host to a device without synchronization."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from the host through pinned memory, without which a copy synchronizes."""
    if device.type == "cuda" and not tensor.is_cuda and torch.cuda.is_initialized():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
