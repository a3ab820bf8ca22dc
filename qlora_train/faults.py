"""Faults on purpose: every point where something durable changes on disk has a number, and one of them can be made to fail.

``QLORA_FAULT=kill@7`` ends the process at the seventh point as a power cut would; a test that counts the points of a run
(`passed`) can so try every one of them. At that point

- ``kill``: the process is killed before the change;
- ``short``: the change is half done (a file has half of its bytes), then the process is killed;
- ``enospc``: a file has half of its bytes, and the system says that the disk is full;
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
def point(path: Path) -> Iterator[None]:
    """Number the change of `path` that is made inside, and let it fail when it is the one that is to fail.

    Raises:
        OSError: the change is made to fail.
        ValueError: the environment variable is not ``KIND@NUMBER``.
    """
    global _passed  # noqa: PLW0603
    _passed += 1
    kind = _wanted(_passed)
    if kind == "kill":
        _die()
    if kind == "perm":
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    yield
    if kind is not None:
        _halve(path)
        if kind == "short":
            _die()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _wanted(number: int) -> str | None:
    """Return the kind of fault that is wanted at a point, or None."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    kind, _, at = text.partition("@")
    if kind not in KINDS or not at.isdecimal():
        raise ValueError(f"{VARIABLE}={text}: not KIND@NUMBER; the kinds are {', '.join(KINDS)}")
    return kind if int(at) == number else None


def _halve(path: Path) -> None:
    if path.is_file():
        os.truncate(path, path.stat().st_size // 2)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
