"""The package's log in a file, for processes whose messages nobody watches."""

import logging
from pathlib import Path

from qlora_train.utils.secrets import RedactingFormatter


def log_to_file(file: Path) -> None:
    """Append the package's log to a file from here on, with times and with secrets redacted."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(RedactingFormatter("%(asctime)s %(message)s"))
    root = logging.getLogger("qlora_train")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
