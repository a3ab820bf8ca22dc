"""Trying a model before its first step without a trace: afterwards the run is as if nothing had been."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_train.runs import random_state, restore_random_state


@dataclass(frozen=True)
class _Known:
    """What a module keeps between two batches: its buffers, and what it knows of them, as of the lengths it has seen."""

    module: nn.Module
    attributes: dict[str, Any]
    buffers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Each with a copy of its content."""

    @classmethod
    def of(cls, module: nn.Module) -> "_Known":
        buffers = {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers(recurse=False)}
        return cls(module, dict(vars(module)), buffers)

    def put_back(self) -> None:
        vars(self.module).update(self.attributes)
        for name, (buffer, content) in self.buffers.items():
            buffer.data.copy_(content)
            self.module._buffers[name] = buffer


@contextmanager
def preserve_model_state(model: nn.Module) -> Iterator[None]:
    """Leave generators, gradients, modes and buffers as they were, and what modules with buffers know of these."""
    state, training = random_state(), [module for module in model.modules() if module.training]
    known = [_Known.of(module) for module in model.modules() if module._buffers]
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for each in known:
            each.put_back()
        model.eval()
        for module in training:
            module.training = True
        restore_random_state(state)
