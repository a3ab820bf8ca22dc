"""Writing to standard output, and the log on standard error: as plain lines or as JSON lines."""

import io
import json
import logging
import os
import select
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TextIO

from qlora_train.utils import run_events
from qlora_train.utils.file_log import PACKAGE, HeldBack
from qlora_train.utils.secrets import RedactingFormatter, redact
from qlora_train.utils.visible_text import visible

LogFormat = Literal["text", "json"]


@dataclass(frozen=True)
class LogSettings:
    """What a command prints on standard error: from `level` on, as text or as JSON lines."""

    level: int = logging.INFO
    format: LogFormat = "text"


def command_text(words: Sequence[str]) -> str:
    """Return a command of this program for a shell, with secrets redacted before quotes can hide them."""
    return shlex.join(["qlora-train", *map(redact, words)])


def print_text(text: str) -> None:
    """Print long text that may hold any character."""
    with robust_stdout():
        print(text, flush=True)


@contextmanager
def robust_stdout() -> Iterator[None]:
    """Escape characters that stdout cannot encode; ignore a closed pipe (`| head`)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def has_reader() -> bool:
    """Return whether someone still reads standard output; if not (`| head`), discard what is written to it from now on."""
    try:
        file = sys.stdout.fileno()
    except (OSError, ValueError):
        return True  # not a file
    poll = select.poll()
    poll.register(file, 0)  # errors are always reported
    if not poll.poll(0):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), file)
    return False


def set_up_logging(settings: LogSettings | None = None) -> None:
    """Send the package's log to standard error, with secrets redacted, and keep all of it for the run's log file."""
    settings = settings or LogSettings()
    root = logging.getLogger(PACKAGE)
    root.handlers[:] = [ConsoleHandler(settings), HeldBack()]
    root.setLevel(logging.DEBUG)
    root.propagate = False


def log_flags() -> list[str]:
    """Return the options that set up the log of another process as that of this one."""
    handler = console_handler()
    if handler is None:
        return []
    levels = {logging.WARNING: ["--quiet"], logging.DEBUG: ["--verbose"]}
    formats = [] if handler.settings.format == "text" else ["--log-format", handler.settings.format]
    return [*levels.get(handler.settings.level, []), *formats]


def console_handler() -> "ConsoleHandler | None":
    """Return the handler that writes to standard error."""
    handlers = logging.getLogger(PACKAGE).handlers
    return next((handler for handler in handlers if isinstance(handler, ConsoleHandler)), None)


def silence_console() -> None:
    """Print warnings and errors only."""
    if (handler := console_handler()) is not None:
        handler.setLevel(logging.WARNING)


def print_errors(lines: Sequence[str]) -> None:
    """Print the lines that a command ends with, in the format of its log."""
    handler = console_handler()
    as_json = handler is not None and handler.settings.format == "json"
    for line in lines:
        text = json_line("error", line) if as_json else visible(line, keep="\n\t")
        print(text, file=sys.stderr)


def json_line(level: str, message: str, **fields: object) -> str:
    """Return a JSON line of the log."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    stage = run_events.current_stage()
    return json.dumps({"time": time, "level": level, "stage": stage, "message": message, **fields})


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Looks up sys.stderr at each record: a live view replaces it."""

    def __init__(self, settings: LogSettings) -> None:
        super().__init__()
        self.settings = settings
        self.setLevel(settings.level)
        self.setFormatter(_JsonFormatter() if settings.format == "json" else _PlainFormatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _PlainFormatter(RedactingFormatter):
    """Escapes control characters, which a path or a tokenizer may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n\t")


class _JsonFormatter(logging.Formatter):
    """Time, level, stage, message, and the metrics of a log point as fields."""

    def format(self, record: logging.LogRecord) -> str:
        return json_line(record.levelname.lower(), redact(super().format(record)), **getattr(record, "metrics", {}))
