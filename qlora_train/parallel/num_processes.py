"""How many processes train a config: what it says, or one per visible GPU."""

import logging
import os

from qlora_train.config import RunConfig
from qlora_train.utils import launcher
from qlora_train.utils.errors import ConfigError
from qlora_train.utils.launcher import Worker
from qlora_train.utils.visible_gpus import gpu_models, visible_gpus

logger = logging.getLogger(__name__)


def choose_num_processes(config: RunConfig) -> int:
    """Return the number of processes to start on this machine; 1 on a CPU unless the config says otherwise.

    Raises:
        ConfigError: more processes than visible GPUs.
    """
    wanted, num_gpus = config.parallel.processes, len(visible_gpus())
    if config.parallel.strategy == "none" or launcher.is_launched():
        return 1
    if wanted != "auto":
        if 0 < num_gpus < wanted:
            raise ConfigError(
                f"parallel.processes: {wanted}, but {num_gpus} GPU{'s are' if num_gpus > 1 else ' is'} visible; set it to "
                "auto, or hide all GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        return wanted
    models = gpu_models() if "CUDA_VISIBLE_DEVICES" not in os.environ else []
    if len(models) > 1:  # the smallest, perhaps one for the display, would bound what fits and how fast a step is
        logger.info("processes: 1 (GPUs are %s; choose some with CUDA_VISIBLE_DEVICES)", " and ".join(models))
        return 1
    chosen = max(1, min(num_gpus, rows_per_step(config)))
    if num_gpus > 1:
        reason = f"{num_gpus} visible GPUs" if chosen == num_gpus else f"a step has {chosen} rows"
        logger.info("processes: %d (%s; parallel.processes: auto)", chosen, reason)
    return chosen


def check_launched_processes(config: RunConfig, worker: Worker) -> None:
    """Check that the config allows as many processes as a launcher has started.

    Raises:
        ConfigError: it does not, or an optimizer step has fewer rows than processes.
    """
    parallel, started = config.parallel, worker.world_size
    if parallel.strategy == "none":
        raise ConfigError(
            f"parallel.strategy: none, but a launcher started {started} processes; start one, or use strategy auto"
        )
    if parallel.processes not in ("auto", started):
        raise ConfigError(
            f"parallel.processes: {parallel.processes}, but a launcher started {started}; set it to auto or {started}"
        )
    if rows_per_step(config) < started:
        raise ConfigError(
            f"train.gradient_accumulation_steps: an optimizer step has {rows_per_step(config)} rows, fewer than the "
            f"{started} processes; raise it, or start fewer processes"
        )


def rows_per_step(config: RunConfig) -> int:
    """Return the rows, or packs, of an optimizer step, over all processes."""
    return config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
