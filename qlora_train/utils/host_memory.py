"""Host memory available to this process, within the limits of its container's cgroups."""

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By controller in /proc/self/cgroup (empty in version 2): limit, usage, and the reclaimable page cache in memory.stat."""


def available_bytes() -> int:
    """Return the bytes that can be allocated without swapping."""
    return min([psutil.virtual_memory().available, *(left for _, left in _cgroup_memory())])


def limit_bytes() -> int:
    """Return the bytes of memory that this process may use in all: the machine's, or the limit of a cgroup."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroup_memory())])


def _cgroup_memory() -> Iterator[tuple[int, int]]:
    """Yield limit and left bytes of each cgroup of this process."""
    for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines() if MEMBERSHIP.is_file() else ():
        _, controllers, path = line.split(":", 2)
        version = "memory" if "memory" in controllers.split(",") else controllers
        if version not in _FILES:
            continue
        # inside a container the path is the host's, and the limit is at the root of the container's view
        group = CGROUPS / version / path.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / _FILES[version][0]).is_file():
                yield _limit_and_left(folder, *_FILES[version])
            if folder == CGROUPS / version:
                break


def _limit_and_left(folder: Path, limit: str, use: str, cache: str) -> tuple[int, int]:
    allowed = (folder / limit).read_text(encoding="ascii").strip()
    if allowed == "max":
        return psutil.virtual_memory().total, psutil.virtual_memory().total
    stat = folder / "memory.stat"  # gVisor has none
    lines = stat.read_text(encoding="ascii").splitlines() if stat.is_file() else []
    cached = int(dict(line.split() for line in lines).get(cache, 0))
    left = int(allowed) - int((folder / use).read_text(encoding="ascii")) + cached
    return int(allowed), max(0, left)
