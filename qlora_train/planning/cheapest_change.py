"""The cheapest settings with which a run fits, found by planning each. No torch.

First come settings that change no result, from the least time that they cost; then shorter rows, a smaller rank, and more
processes that share the base.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_train.config import RunConfig
from qlora_train.config.memory_fallbacks import Capabilities, changed_settings, next_fallback
from qlora_train.planning.run_plan import RunPlan

MIN_LENGTH, MIN_RANK = 256, 8
MAX_PROCESSES = 8
MIN_SAVING = 0.005
"""Share of the memory that a change must save to be part of the answer."""

Changes = Mapping[str, Any]
"""By `section.key`."""
Planner = Callable[[RunConfig], RunPlan]


@dataclass(frozen=True, slots=True)
class FittingChange:
    """Settings that fit, and their plan."""

    changes: Changes
    plan: RunPlan

    def yaml_lines(self) -> list[str]:
        """Return the settings as lines of a config."""
        sections: dict[str, list[str]] = {}
        for key, value in self.changes.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, []).append(f"  {name}: {str(value).lower()}")
        return [line for section, lines in sections.items() for line in (f"{section}:", *lines)]


def cheapest_change(config: RunConfig, plan: Planner) -> FittingChange | None:
    """Return the cheapest changes with which a config fits; None if none is found.

    Args:
        plan: plans a config on the device in question.
    """
    steps: list[Changes] = []
    planned = plan(config)
    while not planned.fitted.fits:
        current = _changed(config, steps)
        for changes in _candidates(current, planned):
            tried = plan(_changed(current, [changes]))
            if tried.fitted.least_bytes < (1 - MIN_SAVING) * planned.fitted.least_bytes:
                steps, planned = [*steps, changes], tried
                break
        else:
            return None
    needed = _without_superfluous(config, steps, plan)
    return FittingChange(_merged(needed), plan(_changed(config, needed)))


def _candidates(config: RunConfig, planned: RunPlan) -> Iterator[Changes]:
    """Yield single changes, the cheapest first."""
    train, on_gpu = config.train, planned.device.on_gpu
    if train.dequantized_cache_gb != 0 and not on_gpu:
        yield {"train.dequantized_cache_gb": 0}
    checkpoints_all = set(planned.fitted.plan.levels) == {"full"}
    smaller = next_fallback(train, Capabilities(on_gpu=False, can_checkpoint=True, checkpoints_all=checkpoints_all))
    if smaller is not None:
        yield {f"train.{key}": value for key, value in changed_settings(train, smaller).items()}
    if on_gpu and planned.fitted.plan.optimizer not in ("paged_adamw_8bit", "adafactor", "sgd"):
        yield {"train.optim": "paged_adamw_8bit"}
    if on_gpu and not train.activation_offloading:
        yield {"train.activation_offloading": True}
    if config.data.max_length // 2 >= MIN_LENGTH:
        yield {"data.max_length": config.data.max_length // 2}
    if config.lora.r // 2 >= MIN_RANK:
        yield {"lora.r": config.lora.r // 2}
    rows_per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    if on_gpu and 2 * planned.num_ranks <= min(MAX_PROCESSES, rows_per_step) and config.quantization.load_in_4bit:
        yield {"parallel.strategy": "fsdp", "parallel.processes": 2 * planned.num_ranks}


def _without_superfluous(config: RunConfig, steps: list[Changes], plan: Planner) -> list[Changes]:
    """Return the steps without those that later ones made unnecessary."""
    for step in list(steps):
        fewer = [other for other in steps if other is not step]
        if fewer and plan(_changed(config, fewer)).fitted.fits:
            steps = fewer
    return steps


def _merged(steps: list[Changes]) -> Changes:
    return {key: value for step in steps for key, value in step.items()}


def _changed(config: RunConfig, steps: list[Changes]) -> RunConfig:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in _merged(steps).items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    updates = {section: getattr(config, section).model_copy(update=values) for section, values in sections.items()}
    return config.model_copy(update=updates)
