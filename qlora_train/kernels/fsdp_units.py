"""What of a model FSDP has sharded, and its weights in full while a block runs.

A unit of FSDP is a decoder layer, or the rest of the model. Outside its forward and backward pass its weights are DTensors
of this rank's rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model, or the base inside one, is sharded."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Return whether a weight is not gathered: only its shape and this rank's rows are known."""
    return isinstance(tensor, DTensor)


def own_class(module: nn.Module) -> Any:
    """Return the class of a module before FSDP added its own."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def local_tensor(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather the weights of a unit, without those of units inside; do nothing for any other module.

    All ranks must enter at the same point.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def gathering_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield all modules inside, in order, each while the weights of its unit are gathered."""
    with gathered(module):
        yield module
        for child in module.children():
            yield from gathering_modules(child)


def reshard(model: nn.Module) -> None:
    """Free gathered weights, such as those of the root after an evaluation."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reset_after_failure(model: nn.Module) -> None:
    """Make a sharded model usable after an exception in its forward or backward pass."""
    root = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
    if root is not None:
        root.reset_iter_state()
