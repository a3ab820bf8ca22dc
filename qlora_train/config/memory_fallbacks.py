"""Memory fallbacks: training settings that need less memory and more time, tried in order when a batch does not fit.

Each keeps the rows of every optimizer step and the number of steps.
"""

from collections.abc import Mapping
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


def next_fallback(train: TrainSection, capabilities: Capabilities) -> TrainSection | None:
    """Return the cheapest settings that need less memory than `train`, or None if there are none."""
    rows, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    changes: dict[str, Any]
    if rows > 1:
        factor = next(number for number in range(2, rows + 1) if rows % number == 0)
        changes = {"per_device_train_batch_size": rows // factor, "gradient_accumulation_steps": steps * factor}
    elif train.gradient_checkpointing != "full" and capabilities.can_checkpoint and not capabilities.checkpoints_all:
        changes = {"gradient_checkpointing": "full"}
    elif capabilities.on_gpu and not train.activation_offloading:
        changes = {"activation_offloading": True}
    else:
        return None
    return train.model_copy(update=changes)


def changed_settings(asked: TrainSection, fitted: TrainSection) -> dict[str, Any]:
    """Return the settings that fallbacks changed, by key of the train section."""
    return {key: getattr(fitted, key) for key in KEYS if getattr(fitted, key) != getattr(asked, key)}


def as_overrides(changes: Mapping[str, Any]) -> str:
    """Return changes as command-line arguments."""
    return " ".join(f"train.{key}={str(value).lower()}" for key, value in changes.items())
