"""Runs in a child process with a limited address space, so that memory runs out."""

import ctypes
import multiprocessing
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qlora_train.export import fresh_process
from qlora_train.training import train_loop
from tests.faults import child
from tests.faults.runs import Child, Ended

WITHOUT_LIMIT = 1 << 40
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 1 << 20
"""glibc maps larger blocks one by one and unmaps them when freed, so that the heap does not fragment."""


def run(arguments: list[str], log: Path, told: Connection, moment: str, spare_bytes: int) -> None:
    """Run the command line; from the call of `train_loop.<moment>` on, limit memory to that in use plus `spare_bytes`."""
    real = getattr(train_loop, moment)

    def limited(*values: Any, **named: Any) -> Any:
        _limit(spare_bytes)
        return real(*values, **named)

    setattr(train_loop, moment, limited)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    child.run(arguments, log, {}, told)


def run_limited(arguments: list[str], log: Path, *, moment: str, spare_bytes: int) -> Ended:
    """Run the command line with a memory limit in a child process."""
    context = multiprocessing.get_context(fresh_process.start_method())
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(arguments, log, theirs, moment, spare_bytes))
    process.start()
    theirs.close()
    started = Child(process, ours, log)
    started.wait_until_it_begins()
    return started.end()


def _limit(spare_bytes: int) -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used_bytes = int(status["VmSize"].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + spare_bytes, resource.RLIM_INFINITY))
