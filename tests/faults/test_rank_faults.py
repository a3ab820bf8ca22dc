"""Faults of one rank: the others end with it, without hanging, and the same command resumes."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Table, number
from tests.faults.runs import Ended
from tests.support.pico import build_pico
from tests.support.ranked_runs import RankedRuns, lines_of

SETTINGS = ("train.max_steps=12", "train.save_steps=1", "data.eval=0.25", "train.eval_steps=4")
END_SECONDS = 30.0
"""From the end of one rank to the end of all."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RankedRuns:
    folder = tmp_path_factory.mktemp("ranks")
    return RankedRuns(folder, build_pico(folder / "base", num_hidden_layers=1))


@pytest.fixture(scope="module")
def undisturbed(runs: RankedRuns) -> tuple[bytes, float]:
    """The adapter of two undisturbed processes, and the seconds that they take with cached data."""
    runs.finished_by_ranks(runs.new(), 2, *SETTINGS)
    begun = time.monotonic()
    return runs.finished_by_ranks(runs.new(), 2, *SETTINGS), time.monotonic() - begun


def test_a_killed_rank_ends_the_others_and_the_run_resumes(
    runs: RankedRuns, undisturbed: tuple[bytes, float], table: Table
) -> None:
    expected, seconds = undisturbed
    count = number(4, 60)
    for trial in range(count):
        draw = random.Random(trial)
        run, victim = runs.new(), draw.randrange(2)
        ranks = runs.start_connected(run, 2, *SETTINGS)
        time.sleep(draw.uniform(0, seconds))
        ranks[victim].process.kill()
        killed, other = ranks[victim].end(), ranks[1 - victim].end(END_SECONDS)
        assert killed.status in (-signal.SIGKILL, 0)
        if killed.status and other.status:  # rank 0 continues alone after training
            assert_one_line(other, 1 - victim)
        assert runs.finished_by_ranks(run, 2, *SETTINGS) == expected
    table.add(
        "kill -9 of a random rank of two", count, count, "the other ended with one line; resumed to the same bits"
    )


def test_a_killed_rank_of_a_sharded_base_ends_the_others(runs: RankedRuns, table: Table) -> None:
    settings = (*SETTINGS, "parallel.strategy=fsdp")
    expected = runs.finished_by_ranks(runs.new(), 2, *settings)
    count = number(2, 20)
    for trial in range(count):
        draw = random.Random(200 + trial)
        run, victim = runs.new(), draw.randrange(2)
        ranks = runs.start_ranks(run, 2, *settings)
        wait_for_checkpoint(run.checkpoint(draw.randint(1, 8)))
        ranks[victim].process.kill()
        killed, other = ranks[victim].end(), ranks[1 - victim].end(END_SECONDS)
        assert killed.status == -signal.SIGKILL
        assert_one_line(other, 1 - victim)
        assert runs.finished_by_ranks(run, 2, *settings) == expected
    table.add("kill -9 of a rank under fsdp", count, count, "the other ended with one line; resumed to the same bits")


def wait_for_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not folder.is_dir():
        assert time.monotonic() < deadline, f"{folder.name} is not written"
        time.sleep(0.02)


def test_a_signal_to_one_rank_stops_all_at_one_step(
    runs: RankedRuns, undisturbed: tuple[bytes, float], table: Table
) -> None:
    expected, seconds = undisturbed
    statuses = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}
    count = number(4, 60)
    for trial in range(count):
        draw = random.Random(100 + trial)
        run, target, sent = runs.new(), draw.randrange(2), draw.choice(list(statuses))
        ranks = runs.start_connected(run, 2, *SETTINGS)
        time.sleep(draw.uniform(0, seconds))
        process = ranks[target].process
        if process.is_alive():
            os.kill(process.pid, sent)
        signalled, other = ranks[target].end(END_SECONDS), ranks[1 - target].end(END_SECONDS)
        assert signalled.status in (statuses[sent], 0), signalled.log
        if other.status not in (statuses[sent], 0):  # outside training only the signalled process stops
            assert_one_line(other, 1 - target)
        assert runs.finished_by_ranks(run, 2, *SETTINGS) == expected
    table.add("signal to a random rank of two", count, count, "both ended; resumed to the same bits")


def test_a_rank_with_another_config_is_one_line(runs: RankedRuns) -> None:
    ended = [
        rank.end(END_SECONDS)
        for rank in runs.start_ranks(runs.new(), 2, *SETTINGS, of_rank_1=("train.learning_rate=0.5",))
    ]
    for rank in ended:
        assert rank.status == 2
        (line,) = lines_of(rank)
        assert "train.learning_rate is 0.5 there and 0.01 on rank 0" in line


def test_an_error_of_one_rank_ends_the_other(runs: RankedRuns, tmp_path: Path) -> None:
    """Rank 0 finds the run folder taken, before any other rank could."""
    run = runs.new()
    run.path.mkdir()
    (run.path / "notes.txt").write_text("mine")
    first, second = runs.end_of_ranks(run, 2, *SETTINGS)
    assert (first.status, second.status) == (2, 2)
    assert "run.output_dir is not empty and holds no run" in first.log
    assert_one_line(second, 1)


def assert_one_line(ended: Ended, rank: int) -> None:
    assert ended.status == 2, ended.log
    (line,) = lines_of(ended)
    assert line.startswith(f"rank {rank}: another process of the run has ended")
    assert "Traceback" not in ended.log
