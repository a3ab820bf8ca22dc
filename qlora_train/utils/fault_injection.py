"""Faults on purpose: every point where something durable changes on disk has a number, and one of them can be made to fail.

``QLORA_FAULT=kill@7`` ends the process at the seventh point as a power cut would; a test that counts the points of a run
(`passed`) can so try every one of them. At that point

- ``kill``: the process is killed before the change;
- ``short``: a file gets half of its bytes, then the process is killed; a renaming or deletion is killed right after it;
- ``enospc``: the system says that the disk is full, of a file after half of its bytes;
- ``perm``: the system refuses the change.
"""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "QLORA_FAULT"
KINDS = ("kill", "short", "enospc", "perm")

_passed = 0


def passed() -> int:
    """Return how many points this process has come by."""
    return _passed


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Number the writing of a file's content that is done inside, and let it fail when it is the one that is to fail.

    Raises:
        OSError: it is made to fail.
        ValueError: the environment variable is not ``KIND@NUMBER``.
    """
    kind = _next(path)
    yield
    if kind is not None:
        os.truncate(path, path.stat().st_size // 2)
        _die_or_refuse(kind, path)


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Number a change that the system makes whole or not at all: a renaming, a new folder, a deletion.

    Raises:
        OSError, ValueError: as `writing`.
    """
    kind = _next(path)
    if kind == "enospc":
        _die_or_refuse(kind, path)
    yield
    if kind is not None:
        _die_or_refuse(kind, path)


def _next(path: Path) -> str | None:
    """Number a point; fail there before the change, or return the kind of fault that comes with it or after it."""
    global _passed  # noqa: PLW0603
    _passed += 1
    kind = _wanted(_passed)
    if kind == "kill":
        _die()
    if kind == "perm":
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return kind


def _wanted(number: int) -> str | None:
    """Return the kind of fault that is wanted at a point, or None."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    kind, _, at = text.partition("@")
    if kind not in KINDS or not at.isdecimal():
        raise ValueError(f"{VARIABLE}={text}: not KIND@NUMBER; the kinds are {', '.join(KINDS)}")
    return kind if int(at) == number else None


def _die_or_refuse(kind: str, path: Path) -> None:
    if kind == "short":
        _die()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
