"""The log file of a run: every line, also in a process that is no command; no line ends the run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.terminal import ROOT

LIBRARY = """
import logging, sys
from pathlib import Path
from qlora_train.utils.file_log import logged_to
{set_up}
logger = logging.getLogger("qlora_train.part")
with logged_to(Path(sys.argv[1])):
    logger.debug("a detail")
    logger.info("a fact")
    logger.warning("a warning")
logger.info("a fact after it")
"""


def used_as_a_library(file: Path, set_up: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY.replace("{set_up}", set_up), str(file)], cwd=ROOT, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize(
    ("set_up", "printed"),
    [
        ("", "a warning\n"),
        ("logging.basicConfig(format='%(message)s')", "a warning\n"),
        ("logging.basicConfig(level='INFO', format='%(message)s')", "a fact\na warning\na fact after it\n"),
    ],
    ids=["no logging", "logging", "logging of facts"],
)
def test_an_application_prints_what_it_asked_for_and_the_file_has_every_line(
    set_up: str, printed: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.log"
    assert used_as_a_library(file, set_up) == printed
    written = [line.split(maxsplit=3)[2:] for line in file.read_text(encoding="utf-8").splitlines()]
    assert written == [["DEBUG", "a detail"], ["INFO", "a fact"], ["WARNING", "a warning"]]


def test_a_level_that_an_application_chose_is_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    used_as_a_library(file, "logging.getLogger('qlora_train').setLevel('WARNING')")
    assert [line.split(maxsplit=3)[3] for line in file.read_text(encoding="utf-8").splitlines()] == ["a warning"]


def test_a_line_with_wrong_arguments_does_not_end_the_run(tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    set_up = "logging.getLogger('qlora_train').setLevel('INFO')"
    wrong = LIBRARY.replace('logger.info("a fact")', 'logger.info("%d rows", "ten")').replace("{set_up}", set_up)
    done = subprocess.run(
        [sys.executable, "-c", wrong, str(file)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "TypeError" in done.stderr, "it is reported as logging does"
    assert "a warning" in file.read_text(encoding="utf-8")


FILLING = """
import logging, resource, sys
from pathlib import Path
from qlora_train.utils.file_log import logged_to
logger = logging.getLogger("qlora_train.part")
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
with logged_to(Path(sys.argv[1])):
    logger.info("a line that fits")
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(sys.argv[1]).stat().st_size + 10, limit[1]))
    logger.info("a line whose beginning fits")
    logger.info("another")
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    logger.info("a line after files were deleted")
"""


def test_lines_that_did_not_fit_are_counted_and_none_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    subprocess.run([sys.executable, "-c", FILLING, str(file)], cwd=ROOT, check=True)
    first, missing, last = file.read_text(encoding="utf-8").splitlines()
    assert first.endswith("a line that fits")
    assert missing == "(2 lines are missing)"
    assert last.endswith("INFO    a line after files were deleted")
