"""Memory fallbacks: training settings that need less memory and more time, tried in order when a batch does not fit.

A fallback is a pure function of the training settings. Each keeps the rows of every optimizer step and the number of steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_train.config.schema import TrainSection

KEYS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "activation_offloading",
)  # fmt: skip
"""Settings that a fallback may change."""


@dataclass(frozen=True)
class Capabilities:
    """What the model and its device support; `checkpoints_all`: full checkpointing is on for every layer."""

    on_gpu: bool
    can_checkpoint: bool
    checkpoints_all: bool


def smaller_micro_batch(train: TrainSection, _capabilities: Capabilities) -> TrainSection | None:
    """Divide the micro-batch by its smallest prime factor, and multiply the accumulation steps by it."""
    rows = train.per_device_train_batch_size
    factor = next((number for number in range(2, rows + 1) if rows % number == 0), None)
    if factor is None:
        return None
    steps = train.gradient_accumulation_steps * factor
    return train.model_copy(
        update={"per_device_train_batch_size": rows // factor, "gradient_accumulation_steps": steps}
    )


def checkpoint_all(train: TrainSection, capabilities: Capabilities) -> TrainSection | None:
    """Turn on full activation checkpointing."""
    if train.gradient_checkpointing == "full" or capabilities.checkpoints_all or not capabilities.can_checkpoint:
        return None
    return train.model_copy(update={"gradient_checkpointing": "full"})


def offload_activations(train: TrainSection, capabilities: Capabilities) -> TrainSection | None:
    """Turn on activation offloading."""
    if train.activation_offloading or not capabilities.on_gpu:
        return None
    return train.model_copy(update={"activation_offloading": True})


FALLBACKS: tuple[Callable[[TrainSection, Capabilities], TrainSection | None], ...] = (
    smaller_micro_batch, checkpoint_all, offload_activations,
)  # fmt: skip
"""Cheapest first."""


def next_fallback(train: TrainSection, capabilities: Capabilities) -> TrainSection | None:
    """Return the cheapest settings that need less memory than `train`, or None if there are none."""
    candidates = (fallback(train, capabilities) for fallback in FALLBACKS)
    return next((settings for settings in candidates if settings is not None), None)


def changed_settings(asked: TrainSection, fitted: TrainSection) -> dict[str, Any]:
    """Return the settings that fallbacks changed, by key of the train section."""
    return {key: getattr(fitted, key) for key in KEYS if getattr(fitted, key) != getattr(asked, key)}


def as_overrides(changes: Mapping[str, Any]) -> str:
    """Return changes as command-line arguments."""
    return " ".join(f"train.{key}={str(value).lower()}" for key, value in changes.items())
