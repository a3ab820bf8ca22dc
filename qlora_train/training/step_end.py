"""Step-end callback: logging, evaluation, checkpoints, early stopping, and stops by signal or time limit.

What is due after a step is a function of the settings and the step, so that a resumed run does the same at the same steps.
Stops are those of any rank.
A pending evaluation is due after the checkpoint's step and missing in its log history.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from qlora_train.config import RunConfig
from qlora_train.parallel.shared_stop import shared_stop
from qlora_train.utils import signals

logger = logging.getLogger(__name__)

History = Sequence[Mapping[str, float]]
"""`TrainerState.log_history`: entries with `step`, and `loss` or `eval_loss`."""


@dataclass(frozen=True)
class Schedule:
    """Steps with a log line, an evaluation or a checkpoint.

    Attributes:
        total_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps per epoch; None for a stream.
        logging_steps: steps between log lines.
        eval_steps: steps between evaluations; None: at the end of every epoch.
        save_steps: steps between checkpoints; None: at the end of every epoch.
        has_eval: there are held-out rows.
        patience: evaluations without a lower loss before early stopping; None: no early stopping.
    """

    total_steps: int
    steps_per_epoch: int | None
    logging_steps: int
    eval_steps: int | None
    save_steps: int | None
    has_eval: bool
    patience: int | None

    def logs_after(self, step: int) -> bool:
        """Return whether metrics are logged: every `logging_steps`, and wherever the run may end."""
        may_end = step == self.total_steps or (self.patience is not None and self.evaluates_after(step))
        return may_end or step % self.logging_steps == 0

    def saves_after(self, step: int) -> bool:
        """Return whether a checkpoint is due."""
        return step == self.total_steps or self._is_due(self.save_steps, step)

    def evaluates_after(self, step: int) -> bool:
        """Return whether an evaluation is due."""
        return self.has_eval and step > 0 and (step == self.total_steps or self._is_due(self.eval_steps, step))

    def is_finished(self, step: int, history: History) -> bool:
        """Return whether the run ends after this step."""
        return step >= self.total_steps or self.stops_early(history)

    def stops_early(self, history: History) -> bool:
        """Return whether early stopping ends the run."""
        return self.patience is not None and evaluations_since_best(history) >= self.patience

    def num_evaluations_from(self, step: int) -> int:
        """Return the evaluations due after this step and later ones."""
        return self._num_due(self.eval_steps, step) if self.has_eval else 0

    def num_saves_from(self, step: int) -> int:
        """Return the checkpoints due after this step and later ones."""
        return self._num_due(self.save_steps, step)

    def _num_due(self, every: int | None, step: int) -> int:
        period = every or self.steps_per_epoch or self.total_steps
        last = self.total_steps  # something is always due there
        return last // period - (max(step, 1) - 1) // period + (last % period > 0)

    def _is_due(self, every: int | None, step: int) -> bool:
        period = every or self.steps_per_epoch
        return period is not None and step % period == 0


def make_schedule(config: RunConfig, steps_per_epoch: int | None, *, has_eval: bool) -> Schedule:
    train = config.train
    total = train.max_steps
    if total is None:
        assert steps_per_epoch is not None, "the config requires max_steps for a stream"
        total = math.ceil(train.num_train_epochs * steps_per_epoch)
    return Schedule(
        total, steps_per_epoch, train.logging_steps, train.eval_steps, train.save_steps, has_eval,
        train.early_stopping_patience,
    )  # fmt: skip


def evaluations(history: History) -> dict[int, float]:
    """Return `eval_loss` by step, oldest first."""
    return {int(entry["step"]): entry["eval_loss"] for entry in history if "eval_loss" in entry}


def best_step(history: History) -> int | None:
    """Return the first step with the lowest `eval_loss`; None before the first evaluation."""
    losses = evaluations(history)
    return min(losses, key=lambda step: losses[step]) if losses else None


def evaluations_since_best(history: History) -> int:
    """Return the number of evaluations after the one with the lowest loss."""
    losses = list(evaluations(history).values())
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class StepEndCallback(TrainerCallback):
    """Sets the Trainer's control flags after each step."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._step_started, self._longest_step_seconds = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Check that the Trainer has the same number of steps."""
        assert state.max_steps == self.schedule.total_steps, "the Trainer's number of steps differs from the schedule's"

    def on_step_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Start the clock."""
        self._step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Set what is due; a stop defers the evaluation to the resumed run."""
        step = state.global_step
        self._check_time_limit()
        stops = shared_stop()
        control.should_log = self.schedule.logs_after(step)
        control.should_evaluate = self.schedule.evaluates_after(step) and not stops
        control.should_save = self.schedule.saves_after(step) or stops
        control.should_training_stop = stops or step >= self.schedule.total_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Stop early; depends on the logged history only."""
        if self.schedule.stops_early(state.log_history):
            logger.info("early stopping: eval_loss has not fallen for %d evaluations", self.schedule.patience)
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Stop if a signal came during the checkpoint."""
        if shared_stop():
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Clear the flags: everything due was done at the end of the step."""
        control.should_log = control.should_evaluate = control.should_save = False

    def _check_time_limit(self) -> None:
        self._longest_step_seconds = max(self._longest_step_seconds, time.monotonic() - self._step_started)
        if signals.seconds_left() < self._longest_step_seconds:
            signals.request_timeout()
