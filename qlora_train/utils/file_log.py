"""The package's log in a file, with times and without secrets.

Lines from before the file is known are held back (`HeldBack`) and written first. A file that cannot be written, as on a
full disk, does not end the run: the next line that can be written counts those that are missing.

The file has every line also where the package is used as a library: the application's own handlers then get what they got
without the file.
"""

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from qlora_train.utils import signals
from qlora_train.utils.secrets import RedactingFormatter

PACKAGE = "qlora_train"
MAX_HELD_BACK = 1000
logger = logging.getLogger(__name__)


class HeldBack(logging.Handler):
    """Keeps the first lines of a process until a log file is open."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.records) < MAX_HELD_BACK:
            self.records.append(record)


class _FileHandler(logging.StreamHandler[TextIO]):
    """Writes lines, and counts those that could not be written."""

    def __init__(self, file: Path) -> None:
        super().__init__(file.open("a", encoding="utf-8"))
        self.file, self.num_missing = file, 0
        self.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        missing = f"({self.num_missing} lines are missing)\n" if self.num_missing else ""
        try:
            line = missing + self.format(record) + self.terminator
            self._write(line.encode(errors="backslashreplace"))
            self.num_missing = 0
        except OSError:
            self.num_missing += 1
        except Exception:  # a line with the wrong arguments ends no run
            self.handleError(record)

    def _write(self, line: bytes) -> None:
        """Write a line whole, or not at all: a disk that fills up takes its beginning."""
        file = self.stream.fileno()
        if (num_written := os.write(file, line)) < len(line):
            os.ftruncate(file, os.fstat(file).st_size - num_written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _ApplicationHandler(logging.Handler):
    """Passes lines on to the root logger, as if the package's logger had no level of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        application = logging.getLogger()
        if application.isEnabledFor(record.levelno):
            application.handle(record)


def log_to_file(file: Path) -> None:
    """Send the package's log to a file alone from here on: that of a process whose messages nobody watches."""
    handler = _open(file)
    root = logging.getLogger(PACKAGE)
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG)
    root.propagate = False


@contextmanager
def logged_to(file: Path) -> Iterator[None]:
    """Append the package's log inside to a file as well, and the traceback of an error that ends the block."""
    root = logging.getLogger(PACKAGE)
    handler = _open(file)
    root.addHandler(handler)
    try:
        with _every_line(root):
            yield
    except signals.Stop:
        raise  # whoever opened the run logs where it stopped
    except BaseException:
        handler.handle(logging.makeLogRecord({"levelno": logging.ERROR, "levelname": "ERROR", "msg": "ended by",
                                              "exc_info": sys.exc_info()}))  # fmt: skip
        raise
    finally:
        root.removeHandler(handler)
        handler.stream.close()
    if handler.num_missing:
        logger.warning("%s: the last %d lines are missing (it could not be written)", file, handler.num_missing)


@contextmanager
def _every_line(package: logging.Logger) -> Iterator[None]:
    """Let the package's logger take every line inside, unless a command or the application chose its level."""
    if package.level != logging.NOTSET or not package.propagate:
        yield
        return
    application = _ApplicationHandler()
    package.addHandler(application)
    package.propagate = False
    package.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        package.setLevel(logging.NOTSET)
        package.propagate = True
        package.removeHandler(application)


def _open(file: Path) -> _FileHandler:
    """Open a log file, and write the lines that were held back."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = _FileHandler(file)
    root = logging.getLogger(PACKAGE)
    for held_back in [each for each in root.handlers if isinstance(each, HeldBack)]:
        root.removeHandler(held_back)
        for record in held_back.records:
            handler.handle(record)
    return handler
