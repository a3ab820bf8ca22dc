"""Run another program to its end: it is stopped with this process, and if it prints nothing for too long."""

import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from qlora_train.utils import signals

POLL_SECONDS = 0.2
DRAIN_SECONDS = 5.0
"""Time to read what a program that has ended still left in the pipe; children of its own may keep it open."""
MAX_LINES = 500


@dataclass(frozen=True)
class Finished:
    """Exit status and last lines of a program, errors included.

    Attributes:
        silent_seconds: after how much silence it was stopped; None if it ended by itself.
    """

    status: int
    lines: tuple[str, ...]
    silent_seconds: float | None = None

    @property
    def has_failed(self) -> bool:
        """Return whether it ended with an error, or was stopped."""
        return self.status != 0 or self.silent_seconds is not None

    def problem(self) -> str:
        """Describe why the program failed, in one line."""
        if self.silent_seconds is not None:
            return f"printed nothing for {self.silent_seconds:g} seconds and was stopped"
        if self.status < 0:
            return f"was ended by signal {-self.status}, as by a system that runs out of memory"
        lines = [line.strip() for line in self.lines if line.strip()]
        return f"failed with status {self.status}: {lines[-1] if lines else 'no output'}"


def run_watched(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    max_silent_seconds: float,
    on_line: Callable[[str], None] | None = None,
    open_input: bool = False,
) -> Finished:
    """Run a program and return its status and last lines.

    Args:
        open_input: keep its standard input open, without content, until it ends, so that it can tell when this process
            is killed; else its input is at its end.

    Raises:
        Stop: a signal asked this process to stop; the program has been killed.
    """
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE if open_input else subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    lines: deque[str] = deque(maxlen=MAX_LINES)
    last_line = time.monotonic()
    output = process.stdout
    assert output is not None

    def read() -> None:
        nonlocal last_line
        for line in output:
            last_line = time.monotonic()
            lines.append(line.rstrip("\n"))
            if on_line is not None:
                on_line(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    silent = False
    try:
        while process.poll() is None and not silent:
            signals.raise_if_requested()
            silent = time.monotonic() - last_line > max_silent_seconds
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
    finally:
        process.kill()
        process.wait()
        reader.join(DRAIN_SECONDS)
        if process.stdin is not None:
            process.stdin.close()
    return Finished(process.returncode, tuple(lines), max_silent_seconds if silent else None)
