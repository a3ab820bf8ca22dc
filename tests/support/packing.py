"""Families that can be packed, and losses with gradients to compare."""

from typing import Any

import torch

from qlora_train.architectures import ARCHITECTURES
from qlora_train.objectives.label_losses import label_losses

PACKABLE = sorted(name for name, row in ARCHITECTURES.items() if not row.packing_error)


WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "starcoder2": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
}
"""Families with sliding windows, which shall be shorter than most of DOCUMENTS."""


def losses_and_gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of all labels, and the gradient of their sum with respect to all trained parameters."""
    model.zero_grad()
    found = torch.cat([label_losses(model, **batch).nll for batch in batches])
    found.sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return found.detach(), torch.cat(gradients)
