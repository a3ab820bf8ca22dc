"""What the backward pass needs, kept in the host's memory until then."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


@contextmanager
def activations_on_host(model: nn.Module) -> Iterator[None]:
    """Move what autograd saves to the host, but for the weights, which stay where they are anyway.

    Layers that are computed again save their inputs alone, so that these alone are moved.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    host = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(tensor: torch.Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in weights else host.pack_hook(tensor)

    def unpack(kept: Any) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else host.unpack_hook(kept)

    with saved_tensors_hooks(pack, unpack):
        yield
