"""What a merge computes: a parameter rounded through 4 bits where the run held it so, changed in float32, rounded once."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat

import torch

from qlora_train.export.merging.adapter_deltas import AdapterFile, ExpertLowRank, LowRank, Replace, TokenRows, Update
from qlora_train.export.merging.base_checkpoint import Rounding


def merged_parameter(
    adapter: AdapterFile, name: str, weight: torch.Tensor, update: Update | None, rounding: Rounding, dtype: torch.dtype
) -> torch.Tensor:
    """Return a parameter as it is written, in `dtype`.

    Args:
        weight: as the base holds it; in three dimensions where it stacks a matrix an expert.
    """
    if not weight.is_floating_point():
        return weight
    if isinstance(update, ExpertLowRank) or (update is None and weight.ndim == 3):
        return _merged_experts(adapter, name, weight, update, rounding, dtype)
    return merged_tensor(adapter, update, rounding(name, weight).float()).to(dtype)


def merged_tensor(
    adapter: AdapterFile, update: LowRank | Replace | TokenRows | None, weight: torch.Tensor
) -> torch.Tensor:
    """Return the base's float32 weight with the adapter's change, in float32.

    LoRA: W + scale * B A (https://arxiv.org/abs/2106.09685). DoRA: each row i of that is scaled to the learnt length
    m_i (https://arxiv.org/abs/2402.09353); the length divided by is that of this very base.
    """
    if update is None:
        return weight
    if isinstance(update, Replace):
        return adapter.read(update.key)
    if isinstance(update, TokenRows):
        rows, indices = adapter.read(update.key), torch.tensor(update.indices)
        grown = weight.new_zeros((max(weight.shape[0], max(update.indices) + 1), *weight.shape[1:]))
        grown[: weight.shape[0]] = weight
        return grown.index_copy_(0, indices, rows)
    if update.transposed:
        return merged_tensor(adapter, replace(update, transposed=False), weight.T).T
    weight = weight + (adapter.read(update.b) @ adapter.read(update.a)) * update.scale
    if update.magnitude is None:
        return weight
    length = torch.linalg.norm(weight, dim=1)
    return (adapter.read(update.magnitude) / length).unsqueeze(1) * weight


def _merged_experts(
    adapter: AdapterFile,
    name: str,
    weight: torch.Tensor,
    update: ExpertLowRank | None,
    rounding: Rounding,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Merge one expert after the other, so that float32 copies are of a single matrix."""
    merged = torch.empty(weight.shape, dtype=dtype)
    changes = repeat(None) if update is None else _expert_changes(adapter, update)
    for target, matrix, change in zip(merged, weight, changes, strict=False):
        rounded = rounding(name, matrix).float()
        target.copy_(rounded if change is None else rounded + change)
    return merged


def _expert_changes(adapter: AdapterFile, update: ExpertLowRank) -> Iterator[torch.Tensor]:
    """Yield what is added to each expert's matrix; PEFT keeps A by expert and rank, B by rank and expert."""
    a, b = adapter.read(update.a), adapter.read(update.b)
    a, b = a.reshape(update.num_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, update.num_experts)
    for expert in range(update.num_experts):
        change = (b[:, :, expert] @ a[expert]) * update.scale
        yield change.T if update.transposed else change
