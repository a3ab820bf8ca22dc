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
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines() if MEMBERSHIP.is_file() else ():
        _, controllers, path = line.split(":", 2)
        version = "memory" if "memory" in controllers.split(",") else controllers
        if version not in _FILES:
            continue
        # inside a container the path is the host's, and the limit is at the root of the container's view
        group = CGROUPS / version / path.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / _FILES[version][0]).is_file():
                yield _left_in(folder, *_FILES[version])
            if folder == CGROUPS / version:
                break


def _left_in(folder: Path, limit: str, use: str, cache: str) -> int:
    allowed = (folder / limit).read_text(encoding="ascii").strip()
    if allowed == "max":
        return psutil.virtual_memory().total
    stat = folder / "memory.stat"  # gVisor has none
    lines = stat.read_text(encoding="ascii").splitlines() if stat.is_file() else []
    cached = int(dict(line.split() for line in lines).get(cache, 0))
    return max(0, int(allowed) - int((folder / use).read_text(encoding="ascii")) + cached)
