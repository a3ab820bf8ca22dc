"""Write report.html of a run, and the page that compares several."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import TemplateError

from qlora_train.report.recorded_run import read_run
from qlora_train.report.report_page import render_comparison, render_run
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import CheckpointError, first_line

logger = logging.getLogger(__name__)

COMPARISON = "comparison.html"
OF_DAMAGED_FILES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, TemplateError)
"""What a number raises that is a text, a missing key, or a list where an object was recorded."""


def write_report(path: Path, output: Path | None = None) -> Path:
    """Write the report of a run folder into it, or to `output`; return its path.

    Raises:
        CheckpointError: `path` is not a run folder, or a file of it is not as a run writes it.
    """
    run = read_run(path)
    file = output or run.folder.report_file
    atomic_io.write_text(file, _rendered([path], lambda: render_run(run)))
    return file


def write_comparison(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page that compares runs; return its path.

    Raises:
        CheckpointError: one of `paths` is not a run folder, or a file of it is not as a run writes it.
    """
    file, runs = output or Path(COMPARISON), [read_run(path) for path in paths]
    atomic_io.write_text(file, _rendered(paths, lambda: render_comparison(runs)))
    return file


def _rendered(paths: Sequence[Path], render: Callable[[], str]) -> str:
    try:
        return render()
    except OF_DAMAGED_FILES as error:
        raise CheckpointError(
            f"{', '.join(map(str, paths))}: a JSON file of the run is not as this version writes it "
            f"({type(error).__name__}: {first_line(error)}); restore it, or delete it"
        ) from error


def try_write_report(path: Path) -> bool:
    """Write the report of a run, which its failure must not end: it is one warning. Return whether it was written."""
    try:
        write_report(path)
    except Exception as error:
        logger.warning("report: not written (%s: %s)", type(error).__name__, error)
        return False
    return True
