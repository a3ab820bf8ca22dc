"""Worker processes: results in order, errors in their position, a killed process in one line."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_train.data.worker_pool import num_processes, ordered_map
from qlora_train.utils.errors import DataError
from qlora_train.utils.num_cores import num_cores

ROOT = Path(__file__).parents[2]


def slow_square(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 3 == 0 else 0)
    return number * number, os.getpid()


@pytest.mark.parametrize("num_proc", [1, 2, 3])
def test_results_are_in_the_order_of_the_items(num_proc: int) -> None:
    results = list(ordered_map(slow_square, range(20), num_proc))
    assert [square for square, _ in results] == [number * number for number in range(20)]
    processes = {process for _, process in results}
    assert (processes == {os.getpid()}) == (num_proc == 1)
    assert len(processes) <= num_proc


def test_items_are_read_only_as_needed() -> None:
    read = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    results = ordered_map(slow_square, items(), 2)
    for _ in range(10):
        next(results)
    results.close()
    assert len(read) < 20


def refuse_seven(number: int) -> int:
    if number == 7:
        raise DataError(["line 7 is wrong", "and so is line 8"])
    return number


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_error_is_raised_in_its_position_with_all_problems(num_proc: int) -> None:
    results = ordered_map(refuse_seven, range(100), num_proc)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(DataError) as caught:
        next(results)
    assert caught.value.problems == ("line 7 is wrong", "and so is line 8")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_error_of_the_items_waits_for_the_results_before_it(num_proc: int) -> None:
    def items(first_bad: int) -> Iterator[int]:
        yield from range(first_bad)
        raise DataError("the file is cut short")

    for first_bad, expected in ((5, "the file is cut short"), (8, "line 7 is wrong")):
        results = ordered_map(refuse_seven, items(first_bad), num_proc)
        assert [next(results) for _ in range(min(first_bad, 7))] == list(range(min(first_bad, 7)))
        with pytest.raises(DataError, match=expected):
            next(results)


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_process_is_a_one_line_error() -> None:
    with pytest.raises(DataError, match=r"a process that tokenises was killed, .* set data.num_proc below 2"):
        list(ordered_map(die_at_three, range(10), 2))


def test_small_data_needs_no_worker_process_by_default() -> None:
    assert num_processes(None, 999, min_bytes=1000) == 1
    assert num_processes(None, 1000, min_bytes=1000) == num_cores()
    assert num_processes(3, 1, min_bytes=1000) == 3


KILLED = """
import os, sys, time
from qlora_train.data.worker_pool import ordered_map
def work(item):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(0.2)
for _ in ordered_map(work, range(10_000), 2):
    pass
"""


def test_workers_end_with_a_parent_that_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = {int(process.stdout.readline()) for _ in range(6)}
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=20)  # the end of the pipe comes when the last worker has gone
