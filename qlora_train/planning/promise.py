"""The plan of a real run, kept in its folder: what it will take, and at its end what it took."""

import logging
from typing import Any

import torch

from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.models import BaseSource
from qlora_train.models.strategy import Strategy, device_bytes
from qlora_train.parallel import context
from qlora_train.planning.plan_device import PlanDevice, cpu_name, has_avx512
from qlora_train.planning.plan_text import duration
from qlora_train.planning.run_history import earlier_runs, predict_seconds
from qlora_train.planning.run_plan import RunPlan, plan_run
from qlora_train.planning.workload import RowSizes
from qlora_train.runs import RunFolder, write_json
from qlora_train.training.flops_utilization import ModelFlops
from qlora_train.utils.errors import first_line
from qlora_train.utils.memory_meter import MemoryMeter
from qlora_train.utils.visible_text import shortened

logger = logging.getLogger(__name__)

MAX_REASON_LENGTH = 100
"""Characters of a library's message in the log line; Transformers lists all of its classes."""


class Promise:
    """What rank 0 predicts before it loads the base, and measures from then on."""

    def __init__(self, folder: RunFolder, device: torch.device, plan: RunPlan | None, *, r: int = 0) -> None:
        self._folder, self._plan, self._r = folder, plan, r
        self._meter = MemoryMeter(device)
        self._peak_bytes = 0

    @classmethod
    def of(
        cls,
        config: RunConfig,
        folder: RunFolder,
        source: BaseSource,
        data: PreparedData,
        device: torch.device,
        strategy: Strategy,
    ) -> "Promise":
        """Plan a run, write plan.json and log one line; without a plan the run continues."""
        try:
            plan = _plan(config, folder, source, data, device, strategy)
        except Exception as error:  # such as a model with code of its own: its run needs no plan
            logger.warning("plan: none (%s)", shortened(first_line(error), MAX_REASON_LENGTH))
            return cls(folder, device, None)
        write_json(folder.plan_file, plan.to_json())
        steps = "" if plan.work.num_steps is None else f", {plan.work.num_steps:,} steps"
        time = "" if plan.seconds is None else f", about {duration(plan.seconds)}"
        disk = "" if plan.disk_bytes is None else f", disk {plan.disk_bytes / 1e9:.2f} GB"
        logger.info(
            "plan: peak %.2f GB of %.1f GB%s%s%s",
            plan.fitted.plan.peak_bytes / 1e9, plan.device.memory_bytes / 1e9, steps, time, disk,
        )  # fmt: skip
        for caveat in plan.caveats:
            logger.info("plan: known to be loose (%s)", caveat)
        return cls(folder, device, plan, r=config.lora.r)

    @property
    def flops(self) -> ModelFlops | None:
        """What the model computes per token and label; None without a plan."""
        if self._plan is None:
            return None
        model = self._plan.model
        return ModelFlops.of(
            base_numel=model.active_numel,
            adapter_numel=model.active_adapter_numel(self._r),
            head_numel=model.vocab_size * model.hidden_size,
        )

    def measure(self) -> None:
        """Read the peak, at the end of training."""
        self._peak_bytes = self._meter.peak_bytes()

    def keep(self, result: dict[str, Any]) -> None:
        """Compare the plan with what was measured, in results.json and in the log.

        Args:
            result: of training.
        """
        seconds = result["step_seconds"]
        predicted = None if self._plan is None else self._plan.fitted.plan.peak_bytes
        predicted_seconds = None if self._plan is None else self._plan.seconds
        peak_bytes = self._peak_bytes
        self._folder.add_results(
            plan={
                "predicted_peak_bytes": predicted,
                "measured_peak_bytes": peak_bytes,
                "predicted_seconds": predicted_seconds,
                "measured_seconds": seconds,
            }
        )
        if predicted is not None:
            change = 100 * (peak_bytes / predicted - 1)
            time = ""
            if predicted_seconds is not None:
                time = f"; optimizer steps {duration(seconds)} of {duration(predicted_seconds)}"
            logger.info(
                "plan: peak %.2f GB of the planned %.2f GB (%+.0f %%)%s",
                peak_bytes / 1e9,
                predicted / 1e9,
                change,
                time,
            )


def _plan(
    config: RunConfig,
    folder: RunFolder,
    source: BaseSource,
    data: PreparedData,
    device: torch.device,
    strategy: Strategy,
) -> RunPlan:
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else cpu_name()
    compute_bytes = 2 if on_gpu or has_avx512() else 4
    plan_device = PlanDevice(name, on_gpu, int(device_bytes(device)), compute_bytes=compute_bytes)
    processes = (context().world_size, strategy == "fsdp")
    plan = plan_run(config, source.config, plan_device, RowSizes.of(config, data), processes=processes)
    return predict_seconds(plan, earlier_runs(folder.path.parent, name, besides=folder.path))
