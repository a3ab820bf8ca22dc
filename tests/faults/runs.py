"""Start runs as child processes and compare what they leave."""

import fcntl
import itertools
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from qlora_train.export import fresh_process
from qlora_train.runs import RunFolder
from qlora_train.runs.open_run import LOCK
from tests.faults import child
from tests.support.fault_points import VARIABLE
from tests.support.runs import adapter_bytes, write_rows

Item = TypeVar("Item")
Result = TypeVar("Result")

SETTINGS = (
    "data.max_length=128", "lora.r=64", "lora.lora_dropout=0.1", "train.learning_rate=1e-2",
    "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2", "train.logging_steps=1",
    "train.save_total_limit=2", "data.num_proc=1",
)  # fmt: skip
"""The demo's settings; rank 64 makes tensors large enough for 8-bit optimizer state."""
ONE_AT_A_TIME = threading.Lock()
"""Held while an exit status is read: `multiprocessing` reads those of all processes whenever it starts one."""
TIMEOUT_SECONDS = 120


@dataclass
class Ended:
    """How a process ended: `status` is negative for a signal; `num_points` is None unless it ended by itself."""

    status: int
    log: str
    num_points: int | None = None


class Child:
    """A started process."""

    def __init__(self, process: BaseProcess, reports: Any, log: Path) -> None:
        self.process, self._reports, self._log = process, reports, log

    def wait_until_it_begins(self) -> None:
        """Wait until imports are done and the program begins."""
        assert self._reports.poll(TIMEOUT_SECONDS), "the process did not begin"
        assert self._reports.recv() == "begins"

    def is_alive(self) -> bool:
        """Return whether it has not ended."""
        with ONE_AT_A_TIME:
            return self.process.is_alive()

    def end(self, seconds: float = TIMEOUT_SECONDS) -> Ended:
        """Wait for its end."""
        multiprocessing.connection.wait([self.process.sentinel], seconds)
        with ONE_AT_A_TIME:
            self.process.join(0)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the process hangs: {self._log.read_text()}")
        try:
            points = self._reports.recv() if self._reports.poll() else None
        except EOFError:
            points = None
        return Ended(self.process.exitcode, self._log.read_text(errors="replace"), points)


class Runs:
    """Runs of one base and data set, each in its own folder."""

    def __init__(self, folder: Path, base: Path) -> None:
        self._context = multiprocessing.get_context(fresh_process.start_method())
        self._context.set_forkserver_preload([child.__name__])
        self.folder, self.base = folder, base
        self.rows = write_rows(folder / "rows.jsonl", count=40)
        self._numbers = itertools.count()

    def new(self) -> RunFolder:
        """Return a run folder that does not exist yet."""
        return RunFolder(self.folder / f"run-{next(self._numbers):04d}")

    def copy(self, run: RunFolder) -> RunFolder:
        """Return a copy of a run folder."""
        new = self.new()
        shutil.copytree(run.path, new.path)
        return new

    def start(self, run: RunFolder, *overrides: str, fault: str = "", **environment: str) -> Child:
        """Start the program on a run folder, and return at once."""
        config = self.folder / "config.yaml"
        if not config.is_file():
            config.write_text(
                f"model:\n  model_name_or_path: {self.base}\ndata:\n  train: {self.rows}\nrun:\n  seed: 7\n"
            )
        arguments = [str(config), *SETTINGS, f"run.output_dir={run.path}", *overrides]
        log = self.folder / f"log-{next(self._numbers):04d}"  # not on the run's disk, which may be full
        ours, theirs = self._context.Pipe(duplex=False)
        environment = {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], "HF_HUB_OFFLINE": "1", **environment}
        if fault:
            environment[VARIABLE] = fault
        process = self._context.Process(target=child.run, args=(arguments, log, environment, theirs))
        with ONE_AT_A_TIME:
            process.start()
        theirs.close()
        started = Child(process, ours, log)
        started.wait_until_it_begins()
        return started

    def to_the_end(self, run: RunFolder, *overrides: str, **arguments: Any) -> Ended:
        """Run the program on a run folder until it ends."""
        return self.start(run, *overrides, **arguments).end()

    def finished(self, run: RunFolder, *overrides: str) -> bytes:
        """Run the program to a successful end, and return the bytes of its adapter."""
        ended = self.to_the_end(run, *overrides)
        assert ended.status == 0, f"{ended.status}: {ended.log[-3000:]}"
        return adapter_bytes(run)

    def wait_until_unlocked(self, run: RunFolder) -> None:
        """Wait for the end of what a killed run forked to check its adapter: it inherited the lock."""
        lock = run.path / LOCK
        if lock.is_file():
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX)

    def start_stock(self, folder: Path) -> Child:
        """Start the stock trainer on a folder."""
        ours, theirs = self._context.Pipe(duplex=False)
        log = folder.with_suffix(".log")
        process = self._context.Process(target=child.run_stock, args=(folder, self.base, self.rows, log, theirs))
        with ONE_AT_A_TIME:
            process.start()
        theirs.close()
        started = Child(process, ours, log)
        started.wait_until_it_begins()
        return started


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` in order, with a thread per core; each waits for a process."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(function, items)
