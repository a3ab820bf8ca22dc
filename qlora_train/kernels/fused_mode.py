"""When modules with fused kernels use them: if gradients are on, or inside `fused_without_gradients`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Process:
    forced = False


def fused_kernels_apply() -> bool:
    """Return whether fused kernels compute; evaluation computes as Transformers and PEFT do."""
    return _Process.forced or torch.is_grad_enabled()


@contextmanager
def fused_without_gradients() -> Iterator[None]:
    """Compute forward passes without gradients, and with the kernels of training: bitwise the outputs of training."""
    before, _Process.forced = _Process.forced, True
    try:
        with torch.no_grad():
            yield
    finally:
        _Process.forced = before
