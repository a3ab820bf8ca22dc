"""Runs on real file systems that are too small, just large enough, or fill up."""

import hashlib
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.cli import main
from qlora_train.runs import RunFolder
from qlora_train.utils.errors import explain
from tests.faults.conftest import Table
from tests.faults.disks import PAGE_BYTES, Disk
from tests.faults.runs import Child, Ended, Runs
from tests.support.runs import adapter_bytes

SETTINGS = (
    "train.max_steps=4", "train.save_steps=1", "train.save_total_limit=2", "train.optim=adamw_8bit", "data.eval=0.25",
)  # fmt: skip
MERGING = ("export.merge=true", "export.merge_base=auto", "export.max_loss_increase=10")


def hash_of(folder: Path) -> str:
    """Return a sha256 of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def assert_one_line(ended: Ended) -> str:
    """Check that a run ended with a user error, and return its line."""
    assert ended.status == 2, ended
    assert "Traceback" not in ended.log, ended.log
    return ended.log.strip().splitlines()[-1]


def bytes_needed(line: str) -> int:
    """Return the bytes that a line names, rounded up to 0.1 MB."""
    found = re.search(r"needs ([\d.]+) MB on the disk of", line)
    assert found, line
    return int(float(found[1]) * 1e6)


def test_a_disk_too_small_is_refused_before_step_1_and_the_size_named_is_enough(
    runs: Runs, disk: Disk, table: Table
) -> None:
    run, base = RunFolder(disk.folder / "run"), hash_of(runs.base)
    disk.leave(1 << 20)
    line = assert_one_line(runs.to_the_end(run, *SETTINGS, *MERGING))
    assert "3 checkpoints" in line
    assert "2 merged models" in line
    assert run.checkpoint_steps() == []
    assert not run.metrics_file.exists(), "no step was taken"
    disk.leave(bytes_needed(line))
    runs.finished(run, *SETTINGS, *MERGING)
    assert run.has_merged()
    assert hash_of(runs.base) == base
    table.add("a disk too small", 1, 1, "refused before step 1; with the size it names, the run ends well")


def test_a_resumed_run_ends_on_a_disk_where_a_new_one_would_not(runs: Runs, disk: Disk) -> None:
    run = RunFolder(disk.folder / "run")
    wanted = runs.finished(run, *SETTINGS)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoint(4))
    disk.leave(2 * PAGE_BYTES)  # one for the log
    line = assert_one_line(runs.to_the_end(run, *SETTINGS))
    assert "(1 checkpoint " in line, "one of two is there and one is to come; a new run has three side by side"
    disk.leave(bytes_needed(line))
    assert runs.finished(run, *SETTINGS) == wanted


PHASES: dict[str, Callable[[RunFolder], bool]] = {
    "metrics": lambda run: run.metrics_file.exists(),
    "first checkpoint": lambda run: bool(run.checkpoint_steps()),
    "adapter and results": lambda run: run.adapter.with_name(".adapter.staging").exists() or run.adapter.exists(),
}
"""What exists when the disk fills up."""


def wait_for(phase: Callable[[RunFolder], bool], run: RunFolder, child: Child) -> None:
    while not phase(run) and child.is_alive():
        time.sleep(0.0005)


@pytest.mark.parametrize("phase", PHASES)
def test_a_disk_that_fills_up_at_any_time_gives_one_line(phase: str, runs: Runs, disk: Disk) -> None:
    """Or the run ends well, if the rest fits into pages that it already has."""
    run = RunFolder(disk.folder / "run")
    settings = (*SETTINGS, "train.max_steps=40", "train.save_steps=30")
    child = runs.start(run, *settings)
    wait_for(PHASES[phase], run, child)
    disk.fill()
    ended = child.end()
    if ended.status != 0:
        assert "No space left on device" in assert_one_line(ended)
    assert all(run.checkpoint_problem(step) is None for step in run.checkpoint_steps())
    disk.make_room()
    runs.finished(run, *settings)


@pytest.mark.parametrize(
    ("num_pages", "written"),
    [(1, set()), (3, {"config.yaml"}), (4, {"config.yaml", "run.json"}), (6, {"config.yaml", "run.json", "data.json"})],
)
def test_a_disk_that_is_full_before_the_run_begins_gives_one_line(
    num_pages: int, written: set[str], runs: Runs, disk: Disk
) -> None:
    """The folder and each of its files take a page: each file is once the one that finds no page."""
    run = RunFolder(disk.folder / "run")
    disk.leave(num_pages * PAGE_BYTES)
    line = assert_one_line(runs.to_the_end(run, *SETTINGS))
    assert "No space left on device" in line or line.startswith("run.output_dir: needs"), line
    assert {path.name for path in run.path.iterdir()} == written | {".lock", "run.log"}
    disk.leave(8 << 20)
    runs.finished(run, *SETTINGS)


def test_a_full_disk_leaves_results_as_they_were(runs: Runs, disk: Disk) -> None:
    run = RunFolder(disk.folder / "run")
    runs.finished(run, *SETTINGS)
    before = {path.name: hash_of(path) if path.is_dir() else path.read_bytes() for path in run.path.iterdir()}
    disk.fill()
    with pytest.raises(OSError, match="No space left") as error:
        run.add_results(merge={"merge_base": "original"})
    assert "No space left on device; complete files are intact" in str(explain(error.value))
    assert {path.name: hash_of(path) if path.is_dir() else path.read_bytes() for path in run.path.iterdir()} == before


def test_a_merge_on_a_full_disk_leaves_the_run_whole(
    runs: Runs, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(disk.folder / "run")
    wanted = runs.finished(run, *SETTINGS)
    command = ["merge", str(run.path), *MERGING[1:]]
    for free_bytes in (0, 64 * 1024, 256 * 1024):
        disk.leave(free_bytes)
        before = {path.name for path in run.path.iterdir()}
        assert main.main(command) == 2
        assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]
        assert run.is_finished()
        assert adapter_bytes(run) == wanted
        assert {path.name for path in run.path.iterdir()} == before
    disk.leave(8 << 20)
    assert main.main(command) == 0
    assert run.has_merged()
