"""Every file of a checkpoint is damaged in every way; the run resumes from the one before to the same weights."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.runs import RunFolder
from tests.faults import stock
from tests.faults.conftest import LONG, Table
from tests.faults.runs import Runs, side_by_side
from tests.support.runs import adapter_bytes

SETTINGS = ("train.max_steps=4", "train.save_steps=1", "train.save_total_limit=4", "train.optim=adamw_8bit")
NEWEST = 3


def missing(file: Path) -> None:
    file.unlink()


def cut(share: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))] if share < 1 else content[:-1])

    return damage


def flipped(share: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1
        file.write_bytes(content)

    return damage


def swapped(file: Path) -> None:
    """Take the file of the same name from the checkpoint before."""
    other = file.parents[1] / f"step-{NEWEST - 1:08d}" / file.name
    shutil.copy(other, file)


DAMAGES = {
    "missing": missing, "empty": cut(0), "cut after a byte": cut(1e-9), "cut in half": cut(0.5),
    "last byte missing": cut(1), "first bit flipped": flipped(0), "middle bit flipped": flipped(0.5),
    "last bit flipped": flipped(1), "of another step": swapped,
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(runs: Runs) -> RunFolder:
    run = runs.new()
    runs.finished(run, *SETTINGS)
    return run


@pytest.fixture(scope="module")
def stopped(runs: Runs, straight: RunFolder) -> RunFolder:
    """The run after its third step."""
    run = runs.copy(straight)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoint(NEWEST + 1))
    return run


def test_the_run_does_not_resume_from_a_damaged_checkpoint(
    runs: Runs, stopped: RunFolder, straight: RunFolder, table: Table
) -> None:
    names = sorted(path.name for path in stopped.checkpoint(NEWEST).iterdir())
    assert len(names) >= 9
    cases = [(name, how) for name in names for how in DAMAGES]
    content = {name: (stopped.checkpoint(NEWEST) / name).read_bytes() for name in names}
    before = {name: (stopped.checkpoint(NEWEST - 1) / name).read_bytes() for name in names}

    accepted, same = [], 0
    for name, how in cases:
        run = runs.copy(stopped)
        DAMAGES[how](run.checkpoint(NEWEST) / name)
        if how == "of another step" and content[name] == before[name]:
            same += 1  # two steps have this file in common: there is no damage
            continue
        if run.latest_checkpoint() != run.checkpoint(NEWEST - 1):
            accepted.append((name, how))
        shutil.rmtree(run.path)
    num_cells = len(cases) - same
    table.add(f"damaged checkpoints ({len(names)} files)", num_cells - len(accepted), num_cells, "noticed and skipped")
    assert accepted == []

    def resumes(case: tuple[str, str]) -> bool:
        name, how = case
        run = runs.copy(stopped)
        DAMAGES[how](run.checkpoint(NEWEST) / name)
        return runs.finished(run, *SETTINGS) == adapter_bytes(straight)

    tried = cases if LONG else cases[:: 2 * len(DAMAGES) + 1]
    good = sum(side_by_side(resumes, tried))
    table.add("  of these, resumed", good, len(tried), "from the one before, to the same bits")
    assert good == len(tried)


def test_what_the_same_damage_does_to_the_stock_trainer(runs: Runs, table: Table) -> None:
    """For comparison with what it makes of an undamaged checkpoint; asserts nothing."""
    straight = runs.new().path
    assert runs.start_stock(straight).end().status == 0
    weights = Path("adapter", "adapter_model.safetensors")
    shutil.rmtree(straight / "checkpoints" / f"checkpoint-{stock.NUM_STEPS}")
    undamaged = runs.new().path
    shutil.copytree(straight, undamaged)
    assert runs.start_stock(undamaged).end().status == 0
    wanted = (undamaged / weights).read_bytes()
    newest = straight / "checkpoints" / f"checkpoint-{stock.NUM_STEPS - 1}"
    damages = [how for how in DAMAGES if how != "of another step"]
    cases = [(name, how) for name in sorted(path.name for path in newest.iterdir()) for how in damages]

    def try_case(case: tuple[str, str]) -> str:
        name, how = case
        folder = runs.new().path
        shutil.copytree(straight, folder)
        DAMAGES[how](folder / newest.relative_to(straight) / name)
        if runs.start_stock(folder).end().status != 0:
            return "stuck"
        return "same" if (folder / weights).read_bytes() == wanted else "other weights"

    tried = cases if LONG else cases[::40]
    found = Counter(side_by_side(try_case, tried))
    others = f"{found['other weights']} resumed to other weights, {found['stuck']} could not resume"
    table.add("  the same with the stock trainer", found["same"], len(tried), f"as without the damage; {others}")


def test_checkpoint_under_the_name_of_another_step_is_noticed(runs: Runs, stopped: RunFolder) -> None:
    run = runs.copy(stopped)
    shutil.rmtree(run.checkpoint(NEWEST))
    shutil.copytree(run.checkpoint(NEWEST - 1), run.checkpoint(NEWEST))
    assert run.checkpoint_problem(NEWEST) == f"it holds step {NEWEST - 1}"
    assert run.latest_checkpoint() == run.checkpoint(NEWEST - 1)


def test_checkpoint_of_another_run_is_neither_resumed_from_nor_deleted(
    runs: Runs, stopped: RunFolder, straight: RunFolder
) -> None:
    other = runs.new()
    runs.finished(other, *SETTINGS, "run.seed=8")
    run = runs.copy(stopped)
    foreign = run.checkpoint(1000)
    shutil.copytree(other.checkpoint(4), foreign)
    assert run.checkpoint_problem(1000) == "it is of another run"
    assert runs.finished(run, *SETTINGS, "train.save_total_limit=1") == adapter_bytes(straight)
    assert run.checkpoint_steps() == [4, 1000], "rotation deletes checkpoints of this run only"


def test_run_without_a_complete_checkpoint_restarts(runs: Runs, stopped: RunFolder, straight: RunFolder) -> None:
    run = runs.copy(stopped)
    for step in run.checkpoint_steps():
        (run.checkpoint(step) / "loop.json").unlink()
    ended = runs.to_the_end(run, *SETTINGS)
    assert ended.status == 0
    assert "no complete checkpoint; the run restarts at step 0" in ended.log
    assert adapter_bytes(run) == adapter_bytes(straight)
