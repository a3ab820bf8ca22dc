"""The one device of this process. Imports torch alone: bitsandbytes and others initialise CUDA when they are imported."""

import gc
import logging
import os
import platform
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from qlora_train.errors import ModelError, first_line, is_out_of_memory

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def select_device() -> torch.device:
    """Return the one device of this process, and say so when several GPUs are visible.

    The first call comes before any other library is imported: once CUDA is initialised, which of several GPUs a process
    sees cannot be changed any more.

    Raises:
        ModelError: the process is one of several that a launcher started, or CUDA was initialised with several GPUs.
    """
    expand_segments()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ModelError(
            f"started as one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), which would all train the same rows; "
            "start one process, without a launcher"
        )
    num_gpus = torch.cuda.device_count()  # asks the driver's management library: initialises nothing
    if num_gpus > 1:
        if torch.cuda.is_initialized():
            raise ModelError(
                f"{num_gpus} GPUs are visible and CUDA is in use already; set CUDA_VISIBLE_DEVICES to one of them first"
            )
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[0]
        logger.warning(
            "device: GPU %s of the %d that are visible (one process trains on one GPU; choose another with "
            "CUDA_VISIBLE_DEVICES)", visible[0], num_gpus,
        )  # fmt: skip
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name that torch 2.10 and newer read, and the deprecated one."""
EXPANDABLE = "expandable_segments:True"


def expand_segments() -> None:
    """Let CUDA's allocator extend its segments, so that batches of many lengths do not fragment memory.

    Keeps what the user set. Has no effect once CUDA is initialised. Windows does not support it, and WSL may fail with it
    (pytorch/pytorch#192330).
    """
    supported = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if supported and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = EXPANDABLE


UNTOUCHED_SHARE, FRAGMENTED_SHARE = 0.05, 0.15
"""Share of a GPU's memory that plans leave to libraries and to fragmentation, with and without expandable segments."""


def spare_bytes(device: torch.device, peak_bytes: int) -> int:
    """Return what a plan may add to `peak_bytes`, the most that this process reserves on a GPU; negative if too little.

    Other processes' memory is not counted as free.
    """
    free, total = torch.cuda.mem_get_info(device)
    expands = any(EXPANDABLE in os.environ.get(name, "") for name in ALLOCATOR_VARIABLES)
    share = UNTOUCHED_SHARE if expands else FRAGMENTED_SHARE
    return int(free + torch.cuda.memory_reserved(device) - peak_bytes - share * total)


def free_memory() -> None:
    """Give back the memory of models that nothing refers to any more, those in reference cycles included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(action: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return the result of `action`, or None and the error message if memory ran out; its memory is then free again."""
    try:
        return action(), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    free_memory()  # only here, where nothing refers to the error's frames any more
    return None, reason
