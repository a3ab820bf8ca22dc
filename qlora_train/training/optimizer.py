"""Choose the optimizer of `train.optim: auto`, and restore bitsandbytes' paged state.

Adam's float32 state of a LoRA adapter is 8 bytes per trained parameter: 80 to 400 MB for most models. Where that is a small
share of the GPU's memory, torch's fused AdamW keeps it there. bitsandbytes synchronizes with the GPU after every parameter,
and ends the process if the driver has no managed memory (`CUDA_CHECK_RETURN`).
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.config.optimizers import (
    OPTIMIZERS,
    SMALL_STATE_SHARE,
    TrainedTensor,
    automatic_optimizer,
    optimizer_state_bytes,
)

logger = logging.getLogger(__name__)

STATE_KEYS = {"adamw_torch_fused": "exp_avg", "paged_adamw_8bit": "state1"}
"""A key in the state of each automatic optimizer, which identifies it in a checkpoint."""


def trained_tensors(adapted: AdaptedModel) -> list[TrainedTensor]:
    """Return the trained tensors in the model's order."""
    embeddings = {id(module.weight) for module in adapted.model.modules() if isinstance(module, nn.Embedding)}
    trained = trainable_state(adapted.model).values()
    return [TrainedTensor(tuple(parameter.shape), id(parameter) in embeddings) for parameter in trained]


def choose_optimizer(setting: str, adapted: AdaptedModel, checkpoint: Path | None = None) -> str:
    """Return the optimizer's name in Transformers, and log the reason for a choice of `auto`.

    Args:
        setting: `train.optim`.
        checkpoint: of a resumed run, which keeps its optimizer, also on another GPU.
    """
    device = adapted.loaded.device
    if setting != "auto":
        if OPTIMIZERS[setting].paged and device.type == "cpu":
            logger.warning("optimizer: %s runs without paging on a CPU", setting)
        return setting
    tensors = trained_tensors(adapted)
    gpu_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    name, reason = automatic_optimizer(tensors, gpu_bytes), "on a CPU"
    if gpu_bytes is not None:
        state_bytes = sum(optimizer_state_bytes("adamw_torch_fused", tensor) for tensor in tensors)
        side = "at most" if name == "adamw_torch_fused" else "more than"
        reason = (
            f"float32 state of {state_bytes / 1e6:.0f} MB is {side} {SMALL_STATE_SHARE:.0%} of the GPU's "
            f"{gpu_bytes / 1e9:.0f} GB"
        )
    if checkpoint is not None and (stored := _optimizer_of(checkpoint)):
        name, reason = stored, f"as in {checkpoint.name}"
    logger.info("optimizer: %s (%s)", name, reason)
    return name


def _optimizer_of(checkpoint: Path) -> str | None:
    structure = (checkpoint / "optimizer.json").read_text(encoding="utf-8", errors="replace")
    return next((name for name, key in STATE_KEYS.items() if f'"{key}"' in structure), None)


def page_restored_state(optimizer: Any) -> None:
    """Move the restored state of a paged optimizer into managed memory; bitsandbytes does so with new state only."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # in accelerate's wrapper
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in state.keys() & {"state1", "state2"}:
            state[key] = optimizer.get_state_buffer(parameter, dtype=state[key].dtype).copy_(state[key])
