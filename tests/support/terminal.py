"""A command on a pseudo-terminal, and its screen as an emulator draws it."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyte

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.05


class Terminal:
    """Runs Python with these arguments on a terminal of 80 x 24.

    Attributes:
        words: of the command.
        screens: what the screen showed, each different picture once.
        raw: every byte that the command wrote to the terminal.
    """

    def __init__(self, words: Sequence[str | Path], *, columns: int = 80, rows: int = 24,
                 environment: Mapping[str, str] | None = None) -> None:  # fmt: skip
        self.words = words
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.screens: list[list[str]] = []
        self.raw = b""
        self._master, slave = pty.openpty()
        self.resize(columns, rows)
        inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "FORCE_COLOR")}
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, close_fds=True,
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**inherited, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **(environment or {})},
        )  # fmt: skip
        signal.signal(signal.SIGINT, before)
        os.close(slave)

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def run_until(
        self, is_reached: Callable[[list[str]], bool] = lambda _screen: False, *, timeout: float = 400
    ) -> bool:
        """Feed the screen until it shows something, or the command ends; return whether it was shown."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not self._read():
                return False
            if is_reached(self.screens[-1] if self.screens else []):
                return True
        raise TimeoutError("\n".join(self.screens[-1] if self.screens else []))

    def _read(self) -> bool:
        """Read what there is; False at the end."""
        if not select.select([self._master], [], [], POLL_SECONDS)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.raw += data
        self._stream.feed(data)
        picture = [line.replace("\N{NO-BREAK SPACE}", " ").rstrip() for line in self.screen.display]
        if not self.screens or picture != self.screens[-1]:
            self.screens.append(picture)
        return bool(data)

    def close(self) -> None:
        """Close the terminal under the command."""
        os.close(self._master)

    def wait(self) -> int:
        """Return the exit status."""
        self.run_until()
        os.close(self._master)
        return self.process.wait()
