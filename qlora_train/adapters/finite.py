"""Numbers that are not finite, found before they are kept."""

from collections.abc import Mapping

import torch


def non_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return which of these tensors holds a NaN or an infinity, and how many of its values are one; None when none does."""
    for name, tensor in tensors.items():
        num_wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
        if num_wrong:
            return f"{name} has {num_wrong:,} of {tensor.numel():,} values that are not finite"
    return None
