"""Checks of memory and disks."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from qlora_train.data.token_cache import StoreCache
from qlora_train.doctor.machine_check import Check
from qlora_train.utils import host_memory

RUNS = Path("runs")
"""Parent of the run folders of configs without run.output_dir."""
DOWNLOAD_BYTES = 14 * 10**9
"""The 16-bit weights of a model of 7 billion parameters."""


def memory() -> Iterator[Check]:
    """Report the memory that this process can use."""
    limit = host_memory.limit_bytes()
    total = psutil.virtual_memory().total
    reason = f" (limit of the container; the machine has {_gib(total)})" if limit < total else ""
    yield Check("memory", "ok", f"{_gib(host_memory.available_bytes())} available of {_gib(limit)}{reason}")


def disks() -> Iterator[Check]:
    """Check the folders that runs and downloads are written to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    yield disk("runs", RUNS, "start the run in another folder, or set run.output_dir")
    yield disk("cache of tokenised data", StoreCache(None, "50GB").folder, "set data.cache_dir")
    yield disk("downloads from the Hub", Path(HF_HUB_CACHE), "set HF_HOME to a folder on a larger disk", DOWNLOAD_BYTES)


def disk(name: str, folder: Path, fix: str, wanted_bytes: int = 0) -> Check:
    """Check that a folder can be written to, and report its free space.

    Args:
        wanted_bytes: less free space is noted.
    """
    path = folder.expanduser().absolute()
    existing = next(each for each in (path, *path.parents) if each.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return Check("disk", "problem", f"{name}: {existing} cannot be written to", fix)
    free = shutil.disk_usage(existing).free
    text = f"{name}: {free / 1e9:.1f} GB free ({path})"
    if free < wanted_bytes:
        return Check("disk", "note", f"{text}, and a 7B model has {wanted_bytes / 1e9:.0f} GB", fix)
    return Check("disk", "ok", text)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
