"""A process that `start_processes` started, and its parent: signals from it, reports to it, and an end with it.

The parent writes the number of a signal that it received into a pipe. Job queues and init systems signal every process of a
group themselves: a process that has received a signal of its own ignores the parent's.
"""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_train.utils import atomic_io, signals

PIPE = "QLORA_TRAIN_PARENT_PIPE"
"""Variable with the descriptor that the process reads."""
REPORT = "QLORA_TRAIN_REPORT"
"""Variable with the file for the lines that a process ends with."""
LOST_STATUS = 76
"""Exit status of a process that ended because another one did; the parent reports that one."""


def has_parent() -> bool:
    """Return whether `start_processes` started this process."""
    return REPORT in os.environ


def report(lines: Sequence[str]) -> None:
    """Tell the parent what this process ends with."""
    if has_parent():
        with suppress(OSError):  # the lines may be about a full disk
            atomic_io.write_text(Path(os.environ[REPORT]), json.dumps(list(lines)))


@contextmanager
def linked() -> Iterator[None]:
    """Receive signals from the parent inside, and end at once if it ends; call inside `signals.handle_signals`."""
    if PIPE not in os.environ:
        yield
        return
    descriptor = int(os.environ.pop(PIPE))  # not for processes that this one starts
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_follow, args=(descriptor,), name="parent", daemon=True).start()
    yield


def _follow(descriptor: int) -> None:
    while received := os.read(descriptor, 1):
        signals.receive_from_parent(received[0])
    os._exit(1)  # killed, or ended by a second signal; complete files are intact
