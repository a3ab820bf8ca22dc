"""The one device of this process. Imports torch alone: bitsandbytes and others initialise CUDA when they are imported."""

import ctypes
import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora_train.errors import ModelError

logger = logging.getLogger(__name__)


def select_device() -> torch.device:
    """Return the one device of this process, and say so when several GPUs are visible.

    The first call comes before any other library is imported: once CUDA is initialised, which of several GPUs a process
    sees cannot be changed any more.

    Raises:
        ModelError: the process is one of several that a launcher started, or CUDA was initialised with several GPUs.
    """
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


UNTOUCHED_SHARE = 0.05
"""Of a GPU's memory: what the allocator cannot use for its pieces, and what libraries take later."""


def spare_bytes(device: torch.device, peak_bytes: int) -> int:
    """Return what a GPU has left beside the highest use of this process."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - peak_bytes - UNTOUCHED_SHARE * total)


def free_memory() -> None:
    """Give back the memory of models that nothing refers to any more, those in reference cycles included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt`: bytes at the end of the heap that are given back, and those of a block that is mapped by itself."""
LARGEST_ON_HEAP = 32 << 20
"""The largest that glibc takes for the second; it goes up to it by itself, and to twice that for the first."""


@contextmanager
def keeping_freed_memory(device: torch.device) -> Iterator[None]:
    """Let a CPU's steps find the memory of the steps before them, and give it back at the end.

    glibc hands more than 64 MB of freed memory back to the system at once, which maps and clears every page of it anew in
    the next step. Blocks of more than `LARGEST_ON_HEAP` stay what they are. Other C libraries are left alone.
    """
    library = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP)
    library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_ON_HEAP)
        library.malloc_trim(0)
