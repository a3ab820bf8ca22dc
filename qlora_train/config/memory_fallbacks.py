"""The ladder that a run goes down when a batch does not fit into memory: every rung saves memory and costs time.

A rung is a pure function of the training settings. On each of them an optimizer step has the same rows in the same order,
and a run has the same number of steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_train.config.schema import TrainSection

KEYS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "recompute",
    "activation_offloading",
)  # fmt: skip
"""Settings that a rung may change."""


@dataclass(frozen=True)
class Capabilities:
    """What can be done for a model where it is.

    Attributes:
        on_gpu: it is on a GPU, beside which there is the host's memory.
        recomputes: its layers can be computed again in the backward pass.
        recomputes_all: all of them are, from their inputs on.
    """

    on_gpu: bool
    recomputes: bool
    recomputes_all: bool


Fallback = Callable[[TrainSection, Capabilities], TrainSection | None]


def smaller_micro_batch(train: TrainSection, _able: Capabilities) -> TrainSection | None:
    """Halve the micro-batch, or divide it by the smallest number that it can be divided by; accumulate more of them."""
    rows = train.per_device_train_batch_size
    smaller = _largest_divisor_below(rows)
    if smaller is None:
        return None
    steps = train.gradient_accumulation_steps * (rows // smaller)
    return train.model_copy(update={"per_device_train_batch_size": smaller, "gradient_accumulation_steps": steps})


def recompute(train: TrainSection, able: Capabilities) -> TrainSection | None:
    """Keep a layer's input alone, and compute the layer again in the backward pass."""
    if train.gradient_checkpointing is True or able.recomputes_all or not able.recomputes:
        return None
    return train.model_copy(update={"gradient_checkpointing": True, "recompute": "auto"})


def offload_activations(train: TrainSection, able: Capabilities) -> TrainSection | None:
    """Keep what the backward pass needs in the host's memory."""
    if train.activation_offloading or not able.on_gpu:
        return None
    return train.model_copy(update={"activation_offloading": True})


FALLBACKS: tuple[Fallback, ...] = (smaller_micro_batch, recompute, offload_activations)
"""From the one that costs least to the one that costs most."""


def next_fallback(train: TrainSection, able: Capabilities) -> TrainSection | None:
    """Return the settings one rung further down, or None at the bottom.

    Args:
        train: settings that do not fit.
        able: what can be done.
    """
    rungs = (rung(train, able) for rung in FALLBACKS)
    return next((settings for settings in rungs if settings is not None), None)


def changed_settings(asked: TrainSection, fitted: TrainSection) -> dict[str, Any]:
    """Return the settings that a ladder changed, by key of the train section."""
    return {key: getattr(fitted, key) for key in KEYS if getattr(fitted, key) != getattr(asked, key)}


def as_overrides(changes: Mapping[str, Any]) -> str:
    """Return changes as they are typed on the command line."""
    return " ".join(f"train.{key}={str(value).lower()}" for key, value in changes.items())


def _largest_divisor_below(number: int) -> int | None:
    return next((divisor for divisor in range(number // 2, 0, -1) if number % divisor == 0), None)
