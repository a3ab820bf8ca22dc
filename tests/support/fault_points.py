"""Deliberate faults at numbered points, one at each durable change on disk, in processes that `install` them.

``QLORA_FAULT=kill@7`` kills the process at the seventh point, ``kill@rows:7`` at the seventh whose path has "rows" in it.
At that point

- ``kill``: the process is killed before the change;
- ``short``: half of a file's bytes are written, then the process is killed; it is killed after a rename or deletion;
- ``enospc``: the disk is full, for a file after half of its bytes;
- ``perm``: the change is not permitted.
"""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_train.utils import atomic_io

VARIABLE = "QLORA_FAULT"

_num_points = 0
_num_matching = 0


def install() -> None:
    """Number the changes on disk of this process."""
    atomic_io.writing, atomic_io.changing = writing, changing


def num_points() -> int:
    """Return how many points this process has passed."""
    return _num_points


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Number the write of a file's content inside, and make it fail if it is the chosen point."""
    kind = _next_point(path)
    yield
    if kind is not None:
        os.truncate(path, path.stat().st_size // 2)
        _fail(kind, path)


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Number an atomic change inside (rename, new folder, deletion), and make it fail if it is the chosen point."""
    kind = _next_point(path)
    if kind == "enospc":
        _fail(kind, path)
    yield
    if kind is not None:
        _fail(kind, path)


def _next_point(path: Path) -> str | None:
    global _num_points, _num_matching  # noqa: PLW0603
    _num_points += 1
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    kind, _, point = text.partition("@")
    name, _, number = point.rpartition(":")
    if name not in str(path):
        return None
    _num_matching += 1
    if int(number) != (_num_matching if name else _num_points):
        return None
    if kind in ("kill", "perm"):
        _fail(kind, path)
    return kind


def _fail(kind: str, path: Path) -> None:
    if kind in ("kill", "short"):
        os.kill(os.getpid(), signal.SIGKILL)
    number = errno.EACCES if kind == "perm" else errno.ENOSPC
    raise OSError(number, os.strerror(number), str(path))
