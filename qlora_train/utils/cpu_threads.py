"""OpenMP's wait policy: threads spin on idle CPUs and sleep on busy ones, where spinning takes time from other threads.

libgomp reads its environment once, when torch is imported. Measured in benchmarks/README.md.
"""

import logging
import os
import sys
import time
from pathlib import Path

logger = logging.getLogger(__name__)

SPIN_COUNT = "20000"
"""Iterations before a waiting thread sleeps: tens of microseconds, a few gaps between operations."""
MAX_BUSY = 0.15
"""Threads sleep if other programs use more than this share of the CPUs."""
SAMPLE_SECONDS = 0.2
_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_IDLE_COLUMNS = (3, 4)  # idle and iowait of a line of /proc/stat
_NUM_COLUMNS = 8  # the last two, guests, are in the first two already


def choose_wait_policy() -> None:
    """Set libgomp's environment by the load of the CPUs; the user's values win."""
    if not sys.platform.startswith("linux") or "torch" in sys.modules:
        return
    chosen = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    if chosen:
        logger.debug("cpu threads: %s (environment)", " ".join(chosen))
        return
    busy = busy_share(SAMPLE_SECONDS)
    reason = "CPU load unknown" if busy is None else f"other programs use {busy:.0%} of the CPUs"
    if busy is None or busy > MAX_BUSY:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        logger.debug("cpu threads: sleep while they wait (%s)", reason)
    else:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
        logger.debug("cpu threads: spin briefly before they sleep (%s)", reason)


def busy_share(seconds: float) -> float | None:
    """Return the used share of this process's CPUs, 0 to 1, during a sleep; None if the kernel does not count it."""
    before = _cpu_times()
    time.sleep(seconds)
    spent = [after - earlier for after, earlier in zip(_cpu_times(), before, strict=True)]
    return 1 - sum(spent[column] for column in _IDLE_COLUMNS) / sum(spent) if any(spent) else None


def _cpu_times() -> list[int]:
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = map(str.split, Path("/proc/stat").read_text(encoding="ascii").splitlines())
    ticks = [[int(value) for value in line[1 : _NUM_COLUMNS + 1]] for line in lines if line[0] in names]
    return [sum(column) for column in zip(*ticks, strict=True)]
