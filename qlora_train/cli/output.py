"""Writing to standard output and to the log."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from qlora_train.utils.secrets import RedactingFormatter


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


def set_up_logging() -> None:
    """Send the package's log to standard error as plain lines, with secrets redacted."""
    handler = _StderrHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    root = logging.getLogger("qlora_train")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Looks up sys.stderr at each record: the live progress line replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)
