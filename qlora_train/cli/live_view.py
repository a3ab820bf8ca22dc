"""A live view on a terminal: drawn at most four times a second by a thread of its own, log lines above it.

While it is shown, standard output and error of this process and its children go to a file of the run folder, and their
lines appear above the view; after a crash inside a library the file has its last words. The cursor stays visible, so that
the terminal is as before however the process ends. A view that cannot be drawn, or whose terminal is closed, gives way to
plain lines; the run continues.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.text import Text

from qlora_train.cli.live_screen import LiveScreen
from qlora_train.cli.output import ConsoleHandler, console_handler
from qlora_train.utils import run_events
from qlora_train.utils.run_events import Event, RunOpened
from qlora_train.utils.visible_text import visible

REFRESH_SECONDS = 0.25
STANDARD_STREAMS = (1, 2)
STDERR_FILE = "stderr.log"
logger = logging.getLogger(__name__)


def can_show_live() -> bool:
    """Return whether standard error is a terminal that a view may be drawn on."""
    handler = console_handler()
    plain = handler is None or handler.settings.format != "text" or handler.settings.level != logging.INFO
    if plain or os.environ.get("CI") or os.environ.get("TERM", "") in ("dumb", "unknown", ""):
        return False
    encoding = (sys.stderr.encoding or "").lower().replace("-", "")
    return sys.stderr.isatty() and encoding == "utf8"


@contextmanager
def shown_live() -> Iterator[None]:
    """Show a run that is opened inside on the terminal, if there is one."""
    handler = console_handler()
    if handler is None or not can_show_live():
        yield
        return
    view = LiveView(handler)
    try:
        with run_events.listening(view.receive):
            yield
    finally:
        view.stop()


class LiveView:
    """Starts when the run folder is open, and takes the place of the console's log handler."""

    def __init__(self, handler: ConsoleHandler) -> None:
        self._screen = LiveScreen()
        self._plain_handler = handler
        self._shown: _Shown | None = None

    def receive(self, event: Event) -> None:
        """Take in an event."""
        self._screen.receive(event)
        if isinstance(event, RunOpened) and self._shown is None:
            self._shown = _Shown(self._screen, event.folder / STDERR_FILE, self._plain_handler)

    def stop(self) -> None:
        """Draw the view a last time, and give the terminal back."""
        if self._shown is not None:
            self._shown.stop()
            self._shown = None


class _Shown:
    """The view while it is drawn: the terminal, the redirected streams, the thread and the log handler."""

    def __init__(self, screen: LiveScreen, file: Path, handler: ConsoleHandler) -> None:
        self._terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
        self._console = Console(file=self._terminal, highlight=False, markup=False, emoji=False)
        self._size = os.get_terminal_size(self._terminal.fileno())
        self._console.size = self._size
        self._live = Live(screen, console=self._console, auto_refresh=False, redirect_stdout=False,
                          redirect_stderr=False, vertical_overflow="crop")  # fmt: skip
        self._streams = _Redirected(file)
        self._handler = _AboveHandler(self._console, handler)
        self._plain_handler = handler
        _replace_handler(handler, self._handler)
        self._stopping, self._has_ended = threading.Event(), False
        self._thread = threading.Thread(target=self._draw, name="live view", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._give_back()

    def _draw(self) -> None:
        try:
            self._live.start()
            self._console.show_cursor(True)
            while not self._stopping.wait(REFRESH_SECONDS):
                self._follow_size()
                self._print_lines(self._streams.new_lines())
                self._live.refresh()
        except Exception:
            self._give_back()
            logger.warning("display: stopped after an error; the run continues", exc_info=True)

    def _give_back(self) -> None:
        """Draw a last time, and print plain lines from here on."""
        if self._has_ended:
            return
        self._has_ended = True
        _replace_handler(self._handler, self._plain_handler)
        lines = self._streams.restore()
        try:
            self._print_lines(lines)
            self._live.stop()
        except Exception:
            logger.warning("display: not drawn to its end", exc_info=True)
        with suppress(OSError):
            self._terminal.close()

    def _follow_size(self) -> None:
        size = os.get_terminal_size(self._terminal.fileno())
        if size != self._size:
            self._size = size
            self._console.size = size
            self._console.control(Control.home(), Control.clear())

    def _print_lines(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(Text(visible(line, keep="\t")), soft_wrap=True)


class _Redirected:
    """Standard output and error, where they are a terminal, as a file whose new lines are read."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._writer = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        self._reader = file.open(encoding="utf-8", errors="replace", newline="\n")
        self._rest = ""
        self._saved = {number: os.dup(number) for number in STANDARD_STREAMS if os.isatty(number)}
        _flush()
        for number in self._saved:
            os.dup2(self._writer, number)

    def new_lines(self) -> list[str]:
        """Return the complete lines that were written since the last call."""
        _flush()
        *lines, self._rest = (self._rest + self._reader.read()).split("\n")
        return [line.rstrip("\r").rpartition("\r")[2] for line in lines]  # what a progress bar shows last

    def restore(self) -> list[str]:
        """Give the streams back, and return the lines that were not read."""
        _flush()
        for number, saved in self._saved.items():
            os.dup2(saved, number)
            os.close(saved)
        lines = self.new_lines() + ([self._rest] if self._rest else [])
        os.close(self._writer)
        self._reader.close()
        if self._file.stat().st_size == 0:
            self._file.unlink()
        return lines


class _AboveHandler(logging.Handler):
    """Prints log lines above the view, except for metrics, which it shows."""

    def __init__(self, console: Console, plain: ConsoleHandler) -> None:
        super().__init__(plain.level)
        self.setFormatter(plain.formatter)
        self._console, self._process = console, os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "metrics") or os.getpid() != self._process:  # a forked child may hold a lock of the console
            return
        style = "bold red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else ""
        try:
            self._console.print(Text(self.format(record), style), soft_wrap=True)
        except Exception:  # the terminal is gone, or the view cannot be drawn; run.log has the line
            self.handleError(record)


def _replace_handler(old: logging.Handler, new: logging.Handler) -> None:
    handlers = logging.getLogger("qlora_train").handlers
    if old in handlers:
        handlers[handlers.index(old)] = new


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            with suppress(OSError, ValueError):  # a full disk, or a stream that a library closed
                stream.flush()
