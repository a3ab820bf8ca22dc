"""Time of training: optimizer steps, evaluations with their samples, checkpoints; over all processes of a run.

Checkpoints have the totals, so that a resumed run adds to them. Steps that a kill made the run repeat count once.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from qlora_train.training.step_end import Schedule

SECONDS = ("train_seconds", "step_seconds", "evaluation_seconds", "save_seconds")
COUNTS = ("num_evaluations", "num_saves")


class RunClock(TrainerCallback):
    """Measures this process and adds the totals of earlier ones."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {**dict.fromkeys(SECONDS, 0.0), **dict.fromkeys(COUNTS, 0)}
        self._started: float | None = None
        self._step_started = self._paused_seconds = 0.0
        self._pause_started: float | None = None
        self._start_step = self._start_tokens = 0
        self.schedule: Schedule | None = None  # of the trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        self._started, self._paused_seconds = time.perf_counter(), 0.0
        self._start_step, self._start_tokens = state.global_step, int(state.num_input_tokens_seen)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        self._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        self._totals["step_seconds"] += time.perf_counter() - self._step_started

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Time an evaluation and its samples."""
        with self._paused("evaluation_seconds", "num_evaluations"):
            yield

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Time a checkpoint; its own totals do not have it."""
        with self._paused("save_seconds", "num_saves"):
            yield

    @contextmanager
    def _paused(self, seconds_name: str, count_name: str) -> Iterator[None]:
        self._pause_started = started = time.perf_counter()
        try:
            yield
        finally:
            self._pause_started = None
        seconds = time.perf_counter() - started
        self._totals[seconds_name] += seconds
        self._totals[count_name] += 1
        self._paused_seconds += seconds
        if self._started is None:  # an evaluation that was pending
            self._totals["train_seconds"] += seconds

    @property
    def step_seconds(self) -> float:
        """Seconds of the run's optimizer steps."""
        return self._totals["step_seconds"]

    def state(self) -> dict[str, float]:
        """Return the totals of the run so far."""
        return {**self._totals, "train_seconds": self._totals["train_seconds"] + self._seconds_here()}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue the totals of a checkpoint."""
        self._totals = {name: state[name] for name in (*SECONDS, *COUNTS)}

    def since_last_start(self, state: Any) -> dict[str, float]:
        """Return the steps, tokens and seconds of training since this process started or resumed the run."""
        if self._started is None:
            return {"num_steps": 0, "num_tokens": 0, "train_seconds": 0.0}
        return {
            "num_steps": state.global_step - self._start_step,
            "num_tokens": int(state.num_input_tokens_seen) - self._start_tokens,
            "train_seconds": self._seconds_here(),
        }

    def seconds_left(self, step: int) -> float | None:
        """Return the expected seconds from a log line to the end of training; None before the first step here.

        Steps take as long as those of this process, evaluations and checkpoints as long as those of the run so far; before
        the first one they are not counted.
        """
        schedule, num_steps = self.schedule, step - self._start_step
        if self._started is None or schedule is None or num_steps == 0:
            return None
        now = time.perf_counter()
        pause = 0.0 if self._pause_started is None else now - self._pause_started
        working = now - self._started - self._paused_seconds - pause
        steps = working / num_steps * (schedule.total_steps - step)
        evaluation = self._mean("evaluation_seconds", "num_evaluations") or pause
        evaluations = max(0.0, schedule.num_evaluations_from(step) * evaluation - pause)
        return steps + evaluations + schedule.num_saves_from(step) * self._mean("save_seconds", "num_saves")

    def _mean(self, seconds_name: str, count_name: str) -> float:
        return self._totals[seconds_name] / max(1, self._totals[count_name])

    def _seconds_here(self) -> float:
        return 0.0 if self._started is None else time.perf_counter() - self._started
