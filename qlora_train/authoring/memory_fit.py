"""Lower the rows of a micro-batch until the plan of the run fits into a device's memory."""

from typing import Any

from qlora_train.authoring.base_look import BaseLook
from qlora_train.authoring.recipe_files import Choice
from qlora_train.config import RunConfig
from qlora_train.planning.plan_device import PlanDevice
from qlora_train.planning.run_plan import plan_run
from qlora_train.planning.workload import RowSizes

BATCH, EVAL_BATCH, STEPS = (
    f"train.{key}"
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
)


def fit_micro_batch(settings: dict[str, Choice], base: BaseLook, device: PlanDevice) -> None:
    """Halve the micro-batch, and double the accumulation, until the plan fits or a micro-batch is one row."""
    rows, num_steps = settings[BATCH].value, settings[STEPS].value
    in_step = rows * num_steps
    while rows > 1 and not _fits(settings, base, device):
        rows, num_steps = rows // 2, num_steps * 2
        settings[BATCH] = Choice(rows, f"rows at once: the most that the plan fits into {device.name}")
        settings[EVAL_BATCH] = Choice(rows, settings[EVAL_BATCH].reason)
        settings[STEPS] = Choice(num_steps, f"so that a step has {in_step} rows")


def _fits(settings: dict[str, Choice], base: BaseLook, device: PlanDevice) -> bool:
    sections: dict[str, dict[str, Any]] = {}
    for name, choice in settings.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = choice.value
    config = RunConfig.model_validate(sections)
    planned = plan_run(config, base.content, device, RowSizes.most(config), is_local=base.is_local)
    return planned.fitted.fits
