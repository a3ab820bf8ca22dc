"""What a run is doing, as events: stages, progress, metrics and samples.

The stages emit; the command line listens and renders (plain lines, JSON lines or a live view). Nothing flows back: a
listener that fails is removed, and without listeners events cost a function call. Log lines are not events: they go through
`logging`, which asks `current_stage` for their stage.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from qlora_train.utils import signals

Item = TypeVar("Item")
Outcome = Literal["done", "failed", "stopped"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOpened:
    """The run folder is open and locked."""

    folder: Path


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage began; stages do not nest."""

    name: str


@dataclass(frozen=True, slots=True)
class StageEnded:
    """A stage ended, after `seconds`: it is done, failed by an exception, or was stopped by a signal or time limit."""

    name: str
    seconds: float
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Progress:
    """Part of a stage's work is done: `done` of `total` units; `total` is None if unknown."""

    name: str
    done: float
    total: float | None
    unit: str

    @property
    def is_complete(self) -> bool:
        return self.total is not None and self.done >= self.total


@dataclass(frozen=True, slots=True)
class Restored:
    """Training begins; `history` has the metrics of the log points before it, with `step`: none in a new run."""

    history: Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class StepEnded:
    """An optimizer step is done; no value of the device is read for it."""

    step: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The metrics of a log point.

    Attributes:
        values: by name, as in metrics.jsonl; those of training steps have their speed.
        seconds_left: until the last step; None before the first step of this process.
        memory_bytes: peak of this process's GPU with the CUDA context, as the plan counts; None on a CPU.
    """

    step: int
    num_steps: int
    epoch: float | None
    values: Mapping[str, float]
    seconds_left: float | None
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Sampled:
    """The answer to a held-out prompt after a step; `row` is its index among the held-out rows."""

    step: int
    row: int
    prompt: str
    expected: str
    generated: str


Event = RunOpened | StageStarted | StageEnded | Progress | Restored | StepEnded | Measured | Sampled
Listener = Callable[[Event], None]


class _Process:
    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.stage: str | None = None


_process = _Process()


def emit(event: Event) -> None:
    """Hand an event to every listener; one that raises is removed, because showing a run must not end it."""
    for listener in list(_process.listeners):
        try:
            listener(event)
        except Exception:
            _process.listeners.remove(listener)
            logger.exception("display: stopped after an error; the run continues")


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener` with every event inside."""
    _process.listeners.append(listener)
    try:
        yield
    finally:
        if listener in _process.listeners:
            _process.listeners.remove(listener)


def current_stage() -> str | None:
    """Return the name of the stage that runs."""
    return _process.stage


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Mark the block as a stage of the run."""
    before, started = _process.stage, time.perf_counter()
    outcome: Outcome = "failed"
    _process.stage = name
    emit(StageStarted(name))
    try:
        yield
        outcome = "done"
    except signals.Stop:
        outcome = "stopped"
        raise
    finally:
        seconds = time.perf_counter() - started
        emit(StageEnded(name, seconds, outcome))
        logger.debug("%s: %s after %.1f s", name, outcome, seconds)
        _process.stage = before


class Counter:
    """Counts the work of a `progress` block; a total that becomes known later may be set."""

    def __init__(self, name: str, total: float | None, unit: str) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0.0

    def advance(self, amount: float = 1) -> None:
        """Add to what is done."""
        self.done += amount
        emit(Progress(self.name, self.done, self.total, self.unit))


def amount(progress: Progress) -> str:
    """Describe what is done of how much."""
    if progress.unit == "bytes":
        done = f"{progress.done / 1e6:,.1f}"
        return f"{done} MB" if progress.total is None else f"{done} of {progress.total / 1e6:,.1f} MB"
    done = f"{progress.done:,.0f}"
    return f"{done} {progress.unit}" if progress.total is None else f"{done} of {progress.total:,.0f} {progress.unit}"


@contextmanager
def progress(name: str, total: float | None, unit: str) -> Iterator[Counter]:
    """Count the work of a block.

    Args:
        name: what is done, for example `tokenising`.
        total: units of work; None if unknown.
        unit: `bytes`, or the plural of what is counted.
    """
    counter = Counter(name, total, unit)
    emit(Progress(name, 0, total, unit))
    try:
        yield counter
    finally:
        emit(Progress(name, counter.done, counter.done, unit))


def tracked(
    items: Iterable[Item], name: str, total: float | None, unit: str, size: Callable[[Item], float]
) -> Iterator[Item]:
    """Yield items, and count `size` of each as done when the next one is asked for; see `progress`."""
    with progress(name, total, unit) as counter:
        for item in items:
            yield item
            counter.advance(size(item))
