"""What happens between two steps: logging, evaluation, checkpoints, early stopping, and stopping when asked to.

What is due after a step is a pure function of the settings and the step's number, so that a run which stops anywhere and
goes on does the same things at the same steps. An evaluation that a stop left out is seen in the history that the
checkpoint holds: it is due there and has no entry.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from qlora_train.config import RunConfig
from qlora_train.utils import signals

logger = logging.getLogger(__name__)

History = Sequence[Mapping[str, float]]
"""What a trainer has logged so far: entries with `step`, and `loss` or `eval_loss`."""


@dataclass(frozen=True)
class Schedule:
    """Which steps end in a log line, an evaluation or a checkpoint.

    Attributes:
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of an epoch; None for a stream.
        logging_steps: steps between log lines.
        eval_steps: steps between evaluations; None: at the end of every epoch.
        save_steps: steps between checkpoints; None: at the end of every epoch.
        evaluates: there are held-out rows.
        patience: evaluations without a lower loss after which the run ends; None: it goes to its last step.
    """

    total_steps: int
    steps_per_epoch: int | None
    logging_steps: int
    eval_steps: int | None
    save_steps: int | None
    evaluates: bool
    patience: int | None

    def logs_after(self, step: int) -> bool:
        """Say whether metrics are logged after this step: every `logging_steps`, and where the run ends or may end."""
        may_end = step == self.total_steps or (self.patience is not None and self.evaluates_after(step))
        return may_end or step % self.logging_steps == 0

    def saves_after(self, step: int) -> bool:
        """Say whether a checkpoint is due after this step."""
        return step == self.total_steps or self._ends(self.save_steps, step)

    def evaluates_after(self, step: int) -> bool:
        """Say whether an evaluation is due after this step."""
        return self.evaluates and step > 0 and (step == self.total_steps or self._ends(self.eval_steps, step))

    def is_over(self, step: int, history: History) -> bool:
        """Say whether a run ends after this step: the last one, or the one at which patience ran out."""
        return step >= self.total_steps or self.patience_is_out(history)

    def patience_is_out(self, history: History) -> bool:
        """Say whether early stopping ends the run."""
        return self.patience is not None and steps_since_best(history) >= self.patience

    def _ends(self, every: int | None, step: int) -> bool:
        period = every or self.steps_per_epoch
        return period is not None and step % period == 0


def make_schedule(config: RunConfig, steps_per_epoch: int | None, *, has_eval: bool) -> Schedule:
    """Return what is due when in a run of these settings."""
    train = config.train
    total = train.max_steps
    if total is None:
        assert steps_per_epoch is not None, "the config asks for max_steps with a stream"
        total = math.ceil(train.num_train_epochs * steps_per_epoch)
    return Schedule(
        total, steps_per_epoch, train.logging_steps, train.eval_steps, train.save_steps, has_eval,
        train.early_stopping_patience,
    )  # fmt: skip


def evaluations(history: History) -> dict[int, float]:
    """Return `eval_loss` by step, oldest first."""
    return {int(entry["step"]): entry["eval_loss"] for entry in history if "eval_loss" in entry}


def best_step(history: History) -> int | None:
    """Return the step of the lowest `eval_loss`, the first of equals; None before the first evaluation."""
    losses = evaluations(history)
    return min(losses, key=lambda step: losses[step]) if losses else None


def steps_since_best(history: History) -> int:
    """Return how many evaluations have followed the one with the lowest loss."""
    losses = list(evaluations(history).values())
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class StepEndCallback(TrainerCallback):
    """Tells the training loop what is due after each step, and to stop where it is asked to or would be late.

    Args:
        schedule: what is due when.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._step_began, self._longest_step_seconds = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Check that the loop counts as the schedule does."""
        assert state.max_steps == self._schedule.total_steps, "the training loop counts other steps than the schedule"

    def on_step_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Take the time."""
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Say what is due; a stop leaves out the evaluation, which comes first when the run goes on."""
        step = state.global_step
        self._watch_the_clock()
        stops = signals.requested() is not None
        control.should_log = self._schedule.logs_after(step)
        control.should_evaluate = self._schedule.evaluates_after(step) and not stops
        control.should_save = self._schedule.saves_after(step) or stops
        control.should_training_stop = stops or step >= self._schedule.total_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Stop when patience has run out; decided from the logged history alone."""
        if self._schedule.patience_is_out(state.log_history):
            logger.info("early stopping: eval_loss has not fallen for %d evaluations", self._schedule.patience)
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Stop after a checkpoint during which a stop was asked for."""
        if signals.requested() is not None:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Do nothing a second time: all that is due after a step has been done at the end of the step."""
        control.should_log = control.should_evaluate = control.should_save = False

    def _watch_the_clock(self) -> None:
        self._longest_step_seconds = max(self._longest_step_seconds, time.monotonic() - self._step_began)
        if signals.seconds_left() < self._longest_step_seconds:
            signals.request_timeout()
