"""Every write to disk is made to fail; the run resumes to the same weights."""

import resource
import signal
import time

import pytest

from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io
from tests.faults.conftest import LONG, Table
from tests.faults.disks import Disk
from tests.faults.runs import Child, Ended, Runs, side_by_side
from tests.support.preference_pairs import write_pairs
from tests.support.runs import adapter_bytes

SETTINGS = (
    "train.max_steps=2", "train.save_steps=1", "train.save_total_limit=1", "train.optim=adamw_8bit", "data.eval=0.25",
    "train.eval_steps=2",
)  # fmt: skip
KINDS = {
    "kill": (-signal.SIGKILL, "killed before the change"),
    "short": (-signal.SIGKILL, "killed with the change half done"),
    "enospc": (2, "disk full"),
    "perm": (2, "permission denied"),
}
SHORT_FORM = {"kill": (1, 4), "short": (2, 4), "enospc": (3, 4), "perm": (4, 4)}
"""First point and stride of the short form: together, the kinds try every point once."""


def complete_checkpoints(run: RunFolder) -> set[str]:
    """Return the names of the checkpoints that verify."""
    return {run.checkpoint(step).name for step in run.checkpoint_steps() if run.checkpoint_problem(step) is None}


def leftovers(run: RunFolder) -> list[str]:
    """Return the names of stale files, of which a finished run has none."""
    found = (path.name for folder in (run.path, run.checkpoints) for path in folder.iterdir())
    return [name for name in found if atomic_io.is_stale(name)]


@pytest.fixture(scope="module")
def straight(runs: Runs) -> tuple[bytes, int]:
    """The adapter of an undisturbed run with cached data, and the number of its fault points."""
    runs.finished(runs.new(), *SETTINGS)
    run = runs.new()
    ended = runs.to_the_end(run, *SETTINGS)
    assert ended.status == 0, ended.log
    assert ended.num_points is not None
    return adapter_bytes(run), ended.num_points


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_every_write_point_costs_nothing(
    kind: str, runs: Runs, straight: tuple[bytes, int], table: Table
) -> None:
    wanted, num_points = straight
    _, meaning = KINDS[kind]
    first, stride = (1, 1) if LONG else SHORT_FORM[kind]
    points = range(first, num_points + 1, stride)
    assert num_points > 50

    def try_point(point: int) -> bytes:
        run = runs.new()
        ended = runs.to_the_end(run, *SETTINGS, fault=f"{kind}@{point}")
        assert_ended(kind, point, ended)
        last = max((step for step in run.checkpoint_steps()), default=None)
        assert last is None or complete_checkpoints(run), f"{kind}@{point} left no complete checkpoint"
        adapter = runs.finished(run, *SETTINGS)
        assert leftovers(run) == []
        return adapter

    good = sum(adapter == wanted for adapter in side_by_side(try_point, points))
    table.add(f"{kind} at write points {points}", good, len(points), f"{meaning}: resumed to the same bits")
    assert good == len(points)


WRITES_OF_REFERENCE = (
    "kill@reference_logps:1",
    "short@reference_logps:2",
    "enospc@reference_logps:2",
    "perm@reference_logps:6",
)
"""A new folder, half of the values twice, and the rename that publishes them."""


def test_faults_while_reference_log_probabilities_are_written_cost_nothing(runs: Runs, table: Table) -> None:
    settings = (*SETTINGS, f"data.train={write_pairs(runs.folder / 'reference.jsonl')}", "train.objective=dpo")
    expected = runs.finished(runs.new(), *settings)
    for fault in WRITES_OF_REFERENCE:
        run, kind = runs.new(), fault.partition("@")[0]
        assert_ended(kind, 0, runs.to_the_end(run, *settings, fault=fault))
        assert not run.reference_logps.exists()
        assert not run.checkpoint_steps()
        assert runs.finished(run, *settings) == expected
        assert run.reference_logps.is_dir()
        assert leftovers(run) == []
    table.add("faults while reference values are written", len(WRITES_OF_REFERENCE), len(WRITES_OF_REFERENCE),
              "resumed to the same bits")  # fmt: skip


def assert_ended(kind: str, point: int, ended: Ended) -> None:
    """Check how a run ended; what a report needs is not worth its end."""
    if "report: not written" in ended.log or "row losses: not written" in ended.log:
        assert ended.status == 0, f"{kind}@{point}: {ended}"
        return
    assert ended.status == KINDS[kind][0], f"{kind}@{point}: {ended}"
    if ended.status == 2:
        assert_one_line(ended)


def assert_one_line(ended: Ended) -> None:
    """Check that the last line is the error, without a traceback."""
    assert "Traceback" not in ended.log, ended.log
    last = ended.log.strip().splitlines()[-1]
    assert "No space left on device" in last or "Permission denied" in last, last


LONGER = (*SETTINGS, "train.max_steps=20")


@pytest.fixture(scope="module")
def longer(runs: Runs) -> RunFolder:
    """An undisturbed run that is long enough to be disturbed midway."""
    run = runs.new()
    runs.finished(run, *LONGER)
    return run


def has_checkpoint(run: RunFolder, process: Child) -> bool:
    """Wait for the first checkpoint; False when the process ended before it was seen."""
    while not run.checkpoint_steps() and process.is_alive():
        time.sleep(0.002)
    return process.is_alive()


def test_a_file_size_limit_costs_no_checkpoint(runs: Runs, table: Table, longer: RunFolder) -> None:
    """From the first checkpoint on, the system refuses files beyond a size, for the sizes of all files of a run."""
    sizes = sorted({path.stat().st_size for path in longer.path.rglob("*") if path.is_file()})
    limits = [size - 1 for size in sizes if size > 20_000]  # the log is one too

    def try_limit(limit: int) -> bytes:
        run = runs.new()
        process = runs.start(run, *LONGER)
        assert has_checkpoint(run, process)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        ended = process.end()
        assert ended.status == 2, ended
        assert "Traceback" not in ended.log, ended.log
        assert complete_checkpoints(run)
        return runs.finished(run, *LONGER)

    good = sum(adapter == adapter_bytes(longer) for adapter in side_by_side(try_limit, limits))
    table.add("file size limit (RLIMIT_FSIZE)", good, len(limits), "checkpoints complete, resumed to the same bits")
    assert good == len(limits)


def test_a_disk_that_fills_up_midway_costs_no_checkpoint(
    runs: Runs, table: Table, longer: RunFolder, disk: Disk
) -> None:
    run = RunFolder(disk.folder / "run")
    process = runs.start(run, *LONGER)
    assert has_checkpoint(run, process)
    disk.fill()
    ended = process.end()
    assert ended.status == 2, ended
    assert "No space left on device" in ended.log.splitlines()[-1]
    assert complete_checkpoints(run)
    disk.make_room()
    same = runs.finished(run, *LONGER) == adapter_bytes(longer)
    table.add("a real disk full midway", same, 1, "checkpoints complete, resumed to the same bits")
    assert same


MERGING = ("export.merge=true", "export.merge_base=original", "export.max_loss_increase=10")


@pytest.mark.parametrize("kind", ["kill", "short", "enospc"])
def test_a_fault_at_every_write_point_of_a_merge_leaves_it_complete_or_absent(
    kind: str, runs: Runs, table: Table
) -> None:
    trained = runs.new()
    runs.finished(trained, *SETTINGS)
    merged = runs.copy(trained)
    ended = runs.to_the_end(merged, *SETTINGS, *MERGING)
    assert ended.status == 0, ended.log
    assert ended.num_points is not None
    wanted = (merged.merged / "model.safetensors").read_bytes()
    points = range(1, ended.num_points + 1, 1 if LONG else 6)

    def try_point(point: int) -> bool:
        run = runs.copy(trained)
        ended = runs.to_the_end(run, *SETTINGS, *MERGING, fault=f"{kind}@{point}")
        assert_ended(kind, point, ended)
        assert not run.merged.exists() or run.has_merged()
        assert run.is_finished(), "the adapter is intact"
        assert runs.to_the_end(run, *SETTINGS, *MERGING).status == 0
        assert leftovers(run) == []
        return (run.merged / "model.safetensors").read_bytes() == wanted

    good = sum(side_by_side(try_point, points))
    table.add(
        f"{kind} at write points of a merge", good, len(points), "complete or absent, merged again to the same bits"
    )
    assert good == len(points)
