"""Write report.html of a run, and the page that compares several."""

import logging
from collections.abc import Sequence
from pathlib import Path

from qlora_train.report.recorded_run import read_run
from qlora_train.report.report_page import render_comparison, render_run
from qlora_train.utils import atomic_io

logger = logging.getLogger(__name__)

COMPARISON = "comparison.html"


def write_report(path: Path, output: Path | None = None) -> Path:
    """Write the report of a run folder into it, or to `output`; return its path.

    Raises:
        CheckpointError: `path` is not a run folder.
    """
    run = read_run(path)
    file = output or run.folder.report_file
    atomic_io.write_text(file, render_run(run))
    return file


def write_comparison(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page that compares runs; return its path.

    Raises:
        CheckpointError: one of `paths` is not a run folder.
    """
    file = output or Path(COMPARISON)
    atomic_io.write_text(file, render_comparison([read_run(path) for path in paths]))
    return file


def try_write_report(path: Path) -> bool:
    """Write the report of a run, which its failure must not end: it is one warning. Return whether it was written."""
    try:
        write_report(path)
    except Exception as error:
        logger.warning("report: not written (%s: %s)", type(error).__name__, error)
        return False
    return True
