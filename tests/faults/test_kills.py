"""Processes are killed or stopped at random moments; the same command resumes to the same weights."""

import os
import random
import signal
import time
from collections import Counter

import pytest

from qlora_train.config.objectives import OBJECTIVES
from tests.faults.conftest import LONG, Table, number
from tests.faults.runs import Child, Ended, Runs, side_by_side
from tests.faults.stock import NUM_STEPS
from tests.support.preference_pairs import write_pairs
from tests.support.runs import adapter_bytes
from tests.support.unpaired_rows import write_labelled

SETTINGS = (f"train.max_steps={NUM_STEPS}", "train.save_steps=1", "data.eval=0.25", "train.eval_steps=3")
OPTIMIZERS = ("adamw_8bit", "adamw_torch", "paged_adamw_8bit") if LONG else ("adamw_8bit",)
ROWS_OF = {"preference": write_pairs, "unpaired_preference": write_labelled}
PREFERENCES = [name for name, row in OBJECTIVES.items() if row.dataset_type in ROWS_OF] if LONG else ["dpo"]
SECOND_SIGNAL_SECONDS = 2.0


def undisturbed(runs: Runs, *settings: str) -> tuple[bytes, float]:
    """Return the adapter of an undisturbed run, and its seconds with cached data."""
    runs.finished(runs.new(), *settings)
    run = runs.new()
    process = runs.start(run, *settings)
    begun = time.monotonic()
    assert process.end().status == 0
    return adapter_bytes(run), time.monotonic() - begun


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_runs_killed_at_random_moments_end_in_the_same_bits(optim: str, runs: Runs, table: Table) -> None:
    moments = number(12, 500)
    good = resumed_after_kills(runs, (*SETTINGS, f"train.optim={optim}"), moments)
    table.add(f"kill -9 at random moments, {optim}", good, moments, "resumed to the same bits")
    assert good == moments


@pytest.mark.parametrize("objective", PREFERENCES)
def test_killed_preference_training_ends_in_the_same_bits(objective: str, runs: Runs, table: Table) -> None:
    dataset_type = OBJECTIVES[objective].dataset_type
    rows = ROWS_OF[dataset_type](runs.folder / f"{dataset_type}.jsonl", count=40)
    settings = (*SETTINGS, "train.optim=adamw_8bit", f"data.train={rows}", f"train.objective={objective}")
    moments = number(2, 20)
    good = resumed_after_kills(runs, settings, moments)
    table.add(f"kill -9 at random moments, {objective}", good, moments, "resumed to the same bits")
    assert good == moments


def resumed_after_kills(runs: Runs, settings: tuple[str, ...], num_moments: int) -> int:
    """Kill runs at random moments and return how many resume to the bits of an undisturbed run."""
    wanted, seconds = undisturbed(runs, *settings)
    generator = random.Random(" ".join(settings[len(SETTINGS) :]))
    moments = [generator.uniform(0, seconds) for _ in range(num_moments)]

    def try_moment(moment: float) -> bytes:
        run = runs.new()
        process = runs.start(run, *settings)
        time.sleep(moment)
        process.process.kill()
        assert process.end().status in (-signal.SIGKILL, 0)
        runs.wait_until_unlocked(run)
        return runs.finished(run, *settings)

    return sum(adapter == wanted for adapter in side_by_side(try_moment, moments))


@pytest.mark.skipif(not LONG, reason="for the table of the long form")
def test_what_the_same_kills_do_to_the_stock_trainer(runs: Runs, table: Table) -> None:
    """For comparison; asserts nothing."""
    straight = runs.new().path
    begun = time.monotonic()
    ended = runs.start_stock(straight).end()
    assert ended.status == 0, ended.log
    seconds = time.monotonic() - begun
    weights = "adapter_model.safetensors"
    wanted = (straight / "adapter" / weights).read_bytes()
    moments = [random.Random(trial).uniform(0, seconds) for trial in range(100)]

    def try_moment(moment: float) -> str:
        folder = runs.new().path
        process = runs.start_stock(folder)
        time.sleep(moment)
        process.process.kill()
        process.end()
        if runs.start_stock(folder).end().status != 0:
            return "stuck"
        return "same" if (folder / "adapter" / weights).read_bytes() == wanted else "other weights"

    found = Counter(side_by_side(try_moment, moments))
    others = f"{found['other weights']} resumed to other weights, {found['stuck']} could not resume"
    table.add("  the same with the stock trainer", found["same"], len(moments), f"resumed to the same bits; {others}")


def test_first_signal_saves_the_step_and_the_run_resumes_to_the_same_bits(runs: Runs, table: Table) -> None:
    settings = (*SETTINGS, "train.save_steps=100", "train.optim=adamw_8bit")
    wanted, seconds = undisturbed(runs, *settings)
    statuses = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}
    cases = [
        (list(statuses)[trial % 3], random.Random(f"signal {trial}").uniform(0, seconds))
        for trial in range(number(12, 200))
    ]

    def try_case(case: tuple[signal.Signals, float]) -> tuple[bool, int]:
        asked, moment = case
        run = runs.new()
        process = runs.start(run, *settings)
        time.sleep(moment)
        ended = hit(process, asked)
        assert ended.status in (statuses[asked], 0), ended
        assert "Traceback" not in ended.log, ended.log
        if ended.status:
            last = ended.log.splitlines()[-1]
            assert last.startswith(f"{asked.name}: stopped; the same command resumes: qlora-train {runs.folder}"), last
            if "training: starts" in ended.log and "step 1/" in ended.log:
                assert run.checkpoint_steps(), ended.log
        return runs.finished(run, *settings) == wanted, ended.status

    found = list(side_by_side(try_case, cases))
    good = sum(same for same, _ in found)
    stopped = sum(status != 0 for _, status in found)
    table.add("SIGTERM, SIGINT, SIGUSR1", good, len(cases), f"resumed to the same bits ({stopped} came before the end)")
    assert good == len(cases)
    assert stopped > len(cases) // 2


def hit(process: Child, asked: signal.Signals) -> Ended:
    """Send a signal to a process, which may have ended, and wait for its end."""
    if process.is_alive():
        os.kill(process.process.pid, asked)
    return process.end()


def test_second_signal_ends_the_run_at_once_without_damage(runs: Runs, table: Table) -> None:
    settings = (*SETTINGS, "train.optim=adamw_8bit")
    wanted, seconds = undisturbed(runs, *settings)
    moments = [random.Random(f"twice {trial}").uniform(0, seconds) for trial in range(number(4, 100))]

    def try_moment(moment: float) -> tuple[bool, float]:
        run = runs.new()
        process = runs.start(run, *settings)
        time.sleep(moment)
        for _ in range(2):
            if process.is_alive():
                os.kill(process.process.pid, signal.SIGINT)
                time.sleep(0.05)
        begun = time.monotonic()
        ended = process.end()
        seconds_to_end = time.monotonic() - begun
        assert ended.status in (130, 0), ended
        return runs.finished(run, *settings) == wanted, seconds_to_end

    found = list(side_by_side(try_moment, moments))
    good, slowest = sum(same for same, _ in found), max(seconds for _, seconds in found)
    table.add("Ctrl-C twice", good, len(moments), f"resumed to the same bits; ended within {SECOND_SIGNAL_SECONDS:g} s")
    assert good == len(moments)
    assert slowest < SECOND_SIGNAL_SECONDS


def test_run_ends_before_its_minutes_are_over_and_resumes(runs: Runs, table: Table) -> None:
    minutes = 0.1
    settings = (
        "train.max_steps=5000",
        "train.save_steps=5000",
        f"run.max_minutes={minutes}",
        "train.logging_steps=5000",
    )
    run, steps, seconds = runs.new(), [0], []
    for _ in range(2):
        process = runs.start(run, *settings)
        begun = time.monotonic()
        ended = process.end()
        seconds.append(time.monotonic() - begun)
        assert ended.status == 75, ended
        assert "run.max_minutes: stopped; the same command resumes" in ended.log.splitlines()[-1]
        assert run.checkpoint_steps()[-1] > steps[-1], "each part of the run takes it further"
        steps.append(run.checkpoint_steps()[-1])
    in_time = sum(second < 60 * minutes for second in seconds)
    table.add("run.max_minutes", in_time, len(seconds), f"ended before {60 * minutes:g} s were over, with a checkpoint")
    assert in_time == len(seconds)
