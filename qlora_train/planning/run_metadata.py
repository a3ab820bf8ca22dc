"""What determines a run besides its settings: base, data, device and library versions, recorded when it starts."""

import datetime
import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.export.model_card import library_versions
from qlora_train.models import BaseSource
from qlora_train.parallel import context
from qlora_train.parallel.agreement import require_equal
from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import DataError

logger = logging.getLogger(__name__)


def run_metadata(
    config: RunConfig, source: BaseSource, data: PreparedData, device: torch.device, date: datetime.date
) -> dict[str, Any]:
    """Return what determines a run besides its settings (`config.resume_policy` has the consequence of each change)."""
    on_gpu = device.type == "cuda"
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    adapter_path = config.lora.adapter_path
    weights = Path(adapter_path or "") / "adapter_model.safetensors"
    return {
        "base": source.name,
        "base_identity": source.identity(),
        "adapter": atomic_io.sha256_of(weights) if adapter_path is not None and weights.is_file() else None,
        "date": date.isoformat(),
        "data_fingerprint": data.fingerprint,
        "num_train_rows": data.num_train_rows,
        "num_eval_rows": len(data.eval),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "num_threads": None if on_gpu else torch.get_num_threads(),
        "world_size": context().world_size,
        "versions": library_versions(),
    }


def check_same_data(source: BaseSource, data: PreparedData) -> None:
    """Check that all ranks use the same base, data and library versions, and that each has rows to train on; a collective.

    Raises:
        ConfigError: on every rank, with what differs.
        DataError: fewer training rows than processes.
    """
    num_processes = context().world_size
    if num_processes == 1:
        return
    identity = {"base_identity": source.identity(), "data_fingerprint": data.fingerprint}
    require_equal("base, data or library versions", {**identity, **library_versions()})
    if data.num_train_rows is not None and data.num_train_rows < num_processes:
        raise DataError(
            f"data.train: {data.num_train_rows} rows for {num_processes} processes; lower parallel.processes, or add rows"
        )


def restore_num_threads(folder: RunFolder, device: torch.device, allow_changed: Sequence[str]) -> None:
    """Use as many CPU threads as the run started with: how sums are split determines how they are rounded."""
    if device.type != "cpu" or "num_threads" in allow_changed:
        return
    metadata = folder.metadata()
    recorded = metadata.get("num_threads")
    if metadata.get("world_size") == context().world_size and recorded not in (None, torch.get_num_threads()):
        logger.debug("threads: %d, as at the start of the run (not %d)", recorded, torch.get_num_threads())
        torch.set_num_threads(recorded)
