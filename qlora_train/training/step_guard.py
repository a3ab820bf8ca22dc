"""The numbers of a run: which steps may change the weights, what becomes of the others, and the count of both.

Every optimizer step is judged once, before the update, by its loss and its gradient norm. A number that is not finite
stops the run or leaves the step out, a spike of the loss is warned of or stops the run. All counts are of the whole run:
`state` goes into every checkpoint, so that a resumed run counts, warns and stops at the steps at which it would have.

A step that is left out advances the learning-rate schedule, the data and the step count like any other, so that each of
them stays a pure function of the step count; its loss is no part of any mean.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from qlora_train.adapters.precision import find_non_finite
from qlora_train.config.schema import TrainSection
from qlora_train.training.loss_spikes import WINDOW_STEPS, LossSpikeDetector
from qlora_train.utils.errors import TrainingError

logger = logging.getLogger(__name__)

MAX_SCALER_SKIPS = 8
"""Steps in a row that the loss scaler of float16 may leave out: from one to the next it halves its scale."""
GO_ON = "the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class Step:
    """An optimizer step before its update.

    Attributes:
        number: from 1.
        loss: of its accumulated batch, in nats per label token.
        norm: of its gradient, before clipping.
        scaled: a float16 loss scaler leaves it out by itself when the gradient overflows.
        rows: says which rows it is of.
    """

    number: int
    loss: float
    norm: float
    scaled: bool
    rows: Callable[[], str]

    @property
    def what(self) -> str:
        """What is not finite."""
        return f"the gradient norm is {self.norm}" if math.isfinite(self.loss) else f"the loss is {self.loss}"


class NonFiniteGuard:
    """Judges the steps of a run and counts them.

    Args:
        train: the section of the config.

    Attributes:
        num_taken: steps that changed the weights.
        num_skipped: steps left out for a number that is not finite, at most `train.max_skipped_steps`.
        num_overflows: steps that the float16 loss scaler left out.
        num_spikes: spikes of the loss that were warned of.
    """

    def __init__(self, train: TrainSection) -> None:
        self._train = train
        self._window = LossSpikeDetector()
        self._total_loss = 0.0
        self.num_taken = self.num_skipped = self.num_overflows = self.num_spikes = 0
        self._num_overflows_in_a_row = self._quiet_until = 0

    @property
    def mean_loss(self) -> float | None:
        """Mean over the steps that were taken, in nats per label token; None when none was."""
        return self._total_loss / self.num_taken if self.num_taken else None

    def counts(self) -> dict[str, int]:
        """Return what results.json says of the steps that were not like the others."""
        return {
            "num_skipped_steps": self.num_skipped,
            "num_scaler_skips": self.num_overflows,
            "num_loss_spikes": self.num_spikes,
        }

    def allow(self, step: Step) -> bool:
        """Judge a step and say whether its update is made.

        Raises:
            TrainingError: a number that is not finite or a spike of the loss, where the config does not bear it.
        """
        if math.isfinite(step.loss) and math.isfinite(step.norm):
            self._watch(step)
            self._window.add(step.loss)
            self._total_loss += step.loss
            self.num_taken += 1
            self._num_overflows_in_a_row = 0
            return True
        if math.isfinite(step.loss) and step.scaled:
            self._count_overflow(step)
        else:
            self._skip(step)
        return False

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return {
            "total_loss": self._total_loss, "num_taken": self.num_taken, "num_skipped": self.num_skipped,
            "num_overflows": self.num_overflows, "num_overflows_in_a_row": self._num_overflows_in_a_row,
            "num_spikes": self.num_spikes, "quiet_until": self._quiet_until, "window": self._window.state(),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what a checkpoint held."""
        self._total_loss, self.num_taken = state["total_loss"], state["num_taken"]
        self.num_skipped, self.num_spikes = state["num_skipped"], state["num_spikes"]
        self.num_overflows, self._num_overflows_in_a_row = state["num_overflows"], state["num_overflows_in_a_row"]
        self._quiet_until = state["quiet_until"]
        self._window.restore(state["window"])

    def _watch(self, step: Step) -> None:
        spike = self._window.spike(step.loss)
        if spike is None or self._train.on_loss_spike == "ignore":
            return
        what = f"step {step.number}: the loss is {spike.loss:.4f}, after a median of {spike.median:.4f}"
        where = f"(limit {spike.limit:.4f}); rows of this step: {step.rows()}"
        if self._train.on_loss_spike == "stop":
            raise TrainingError(
                f"{what} {where}; nothing was updated; look at these rows; {GO_ON}, with train.on_loss_spike=warn past "
                "this step; or begin a new run with a lower train.learning_rate"
            )
        if step.number > self._quiet_until:
            self.num_spikes += 1
            self._quiet_until = step.number + WINDOW_STEPS
            logger.warning(
                "%s %s; look at these rows, or begin a new run with a lower train.learning_rate if this comes again; no "
                "more warnings for %d steps", what, where, WINDOW_STEPS,
            )  # fmt: skip

    def _count_overflow(self, step: Step) -> None:
        self.num_overflows += 1
        self._num_overflows_in_a_row += 1
        logger.warning("step %d: gradient overflow in float16, the loss scaler skips the update", step.number)
        if self._num_overflows_in_a_row >= MAX_SCALER_SKIPS:
            raise TrainingError(
                f"step {step.number}: {step.what}, the {MAX_SCALER_SKIPS}th overflow in a row in float16; nothing was "
                f"updated; rows of this step: {step.rows()}; use bfloat16 where the hardware has it "
                "(quantization.bnb_4bit_compute_dtype), or begin a new run with a lower train.learning_rate"
            )

    def _skip(self, step: Step) -> None:
        most = self._train.max_skipped_steps
        if self._train.on_nonfinite == "stop":
            self._stop(step, f"{GO_ON}, with train.on_nonfinite=skip past such steps")
        if self.num_skipped >= most:
            self._stop(step, f"{most} steps were skipped before, as train.max_skipped_steps allows")
        self.num_skipped += 1
        logger.warning(
            "step %d: %s (gradient norm %s); the step is skipped, %d of at most %d (train.max_skipped_steps); rows of "
            "this step: %s", step.number, step.what, step.norm, self.num_skipped, most, step.rows(),
        )  # fmt: skip

    def _stop(self, step: Step, remedy: str) -> None:
        raise TrainingError(
            f"step {step.number}: {step.what} (gradient norm {step.norm}); nothing was updated; rows of this step: "
            f"{step.rows()}; look at these rows; {remedy}; or begin a new run with a lower train.learning_rate"
        )


def check_finite(
    step: int, weights: Mapping[str, nn.Parameter], moments: Mapping[nn.Parameter, Mapping[str, Any]]
) -> None:
    """Refuse to keep a state with a number that is not finite.

    Args:
        step: the state is that after this step.
        weights: all that trains, by name.
        moments: the optimizer's state by parameter.

    Raises:
        TrainingError: names the tensor.
    """
    of_optimizer = {
        f"the optimizer's {key} of {name}": value
        for name, weight in weights.items()
        for key, value in moments.get(weight, {}).items()
        if isinstance(value, torch.Tensor)
    }
    problem = find_non_finite({**weights, **of_optimizer})
    if problem is not None:
        raise TrainingError(
            f"step {step}: {problem} after the update; it was not saved; {GO_ON}; if it stops here again, begin a new run "
            "with a lower train.learning_rate"
        )


def check_trained(step: int, weights: Mapping[str, nn.Parameter], *, num_updates: int) -> None:
    """Refuse the adapter of a run that made no update, or whose every lora_B is still zero.

    Raises:
        TrainingError: names the step and counts the updates.
    """
    if num_updates and any(bool(weight.any()) for name, weight in weights.items() if "lora_B" in name):
        return
    what = "every lora_B is zero: the adapter changes nothing" if num_updates else "every step was skipped"
    raise TrainingError(
        f"step {step}: {what} after {num_updates} updates; the adapter was not written; begin a new run with more steps or "
        "another train.learning_rate"
    )


class AdvanceSkippedSchedule(TrainerCallback):
    """Lets the learning rate be a function of the step count: the loop does not advance it where a loss scaler skipped."""

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Advance it."""
        if parts["optimizer"].step_was_skipped:
            parts["lr_scheduler"].step()
