"""What a run can do with less memory and stay the same run: rungs that leave the global batch, its rows and steps alone.

A rung is what changes in the settings of `train`. Micro-batches become smaller and more of them make a step, so that every
update is computed from the same rows; then activations are recomputed. No torch here.
"""

from collections.abc import Mapping
from typing import Any

from qlora_train.config import RunConfig

Rung = Mapping[str, Any]
"""Settings of `train`, by name."""


def next_rung(config: RunConfig) -> Rung | None:
    """Return the next rung down for a training step, or None at the lowest.

    With `group_by_length` the order of the rows follows from the size of a micro-batch, which therefore stays.
    """
    train = config.train
    if train.per_device_train_batch_size > 1 and not train.group_by_length:
        smaller = _largest_proper_divisor(train.per_device_train_batch_size)
        times = train.per_device_train_batch_size // smaller
        return {
            "per_device_train_batch_size": smaller,
            "gradient_accumulation_steps": train.gradient_accumulation_steps * times,
        }
    if train.gradient_checkpointing is not True:
        return {"gradient_checkpointing": True}
    return None


def next_rung_of_evaluation(config: RunConfig) -> Rung | None:
    """Return the next rung down for an evaluation, or None at the lowest."""
    size = config.train.per_device_eval_batch_size
    return {"per_device_eval_batch_size": size // 2} if size > 1 else None


def on_rung(config: RunConfig, rung: Rung) -> RunConfig:
    """Return the config with the settings of a rung."""
    return config.model_copy(update={"train": config.train.model_copy(update=dict(rung))})


def overrides(rung: Rung) -> str:
    """Return a rung as people type it."""
    return " ".join(f"train.{key}={str(value).lower()}" for key, value in rung.items())


def _largest_proper_divisor(number: int) -> int:
    return next(number // factor for factor in range(2, number + 1) if number % factor == 0)
