"""Run a model before its first step without changing the run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qlora_train.kernels.fsdp_units import reset_after_failure
from qlora_train.runs.training_state import random_state, restore_random_state


@contextmanager
def preserve_model_state(model: nn.Module) -> Iterator[None]:
    """Restore random states, training modes, buffers and the attributes of modules with buffers; clear gradients.

    Attributes may describe buffers: dynamic RoPE stores the longest length seen beside `inv_freq`.
    """
    state, training = random_state(), [module for module in model.modules() if module.training]
    saved = [(module, dict(vars(module)), _copied_buffers(module)) for module in model.modules() if module._buffers]
    try:
        yield
    except Exception:
        reset_after_failure(model)
        raise
    finally:
        model.zero_grad(set_to_none=True)
        for module, attributes, buffers in saved:
            vars(module).update(attributes)
            for name, (buffer, content) in buffers.items():
                buffer.data.copy_(content)
                module._buffers[name] = buffer
        model.eval()
        for module in training:
            module.training = True
        restore_random_state(state)


def _copied_buffers(module: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers(recurse=False)}
