"""Guard of the optimizer step: non-finite losses and gradients and loss spikes are handled before the update.

On a non-finite number: stop, or skip the step. On a loss spike: warn, stop, or ignore it. The counts are those of the whole
run and part of every checkpoint, so that a resumed run counts, warns and stops at the same steps.

A skipped step advances the learning-rate schedule, the data and the step count, which are all functions of the step; its
loss is part of no mean.
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
from qlora_train.config.objectives import dataset_type_of
from qlora_train.config.schema import TrainSection
from qlora_train.training.loss_spikes import WINDOW_STEPS, LossSpikeDetector
from qlora_train.utils.errors import TrainingError

logger = logging.getLogger(__name__)

MAX_SCALER_SKIPS = 8
"""Consecutive steps that float16's loss scaler may skip; each halves its scale."""
STATE = (
    "total_loss", "num_updates", "num_skipped", "num_overflows", "consecutive_overflows", "num_spikes", "quiet_until",
)  # fmt: skip
"""Attributes of the guard in a checkpoint."""
RESUME = "the same command resumes from the last checkpoint"
NEW_RUN = "start a new run with a lower train.learning_rate"


@dataclass(frozen=True)
class Step:
    """An optimizer step before its update.

    Attributes:
        number: from 1.
        loss: of the accumulated batch; for SFT in nats per label token.
        norm: gradient norm before clipping.
        scaled: a float16 loss scaler skips the update if the gradient overflows.
        rows: returns the source locations of its rows.
    """

    number: int
    loss: float
    norm: float
    scaled: bool
    rows: Callable[[], str]

    @property
    def problem(self) -> str:
        """Which number is not finite."""
        return f"the gradient norm is {self.norm}" if math.isfinite(self.loss) else f"the loss is {self.loss}"


class NonFiniteGuard:
    """Decides which steps update the weights, and counts the others.

    Attributes:
        num_updates: steps that changed the weights.
        num_skipped: steps skipped for a non-finite number, at most `train.max_skipped_steps`.
        num_overflows: steps that the float16 loss scaler skipped.
        num_spikes: loss spikes that were warned of.
        quiet_until: last step without another warning.
    """

    def __init__(self, train: TrainSection) -> None:
        self._train = train
        self._detector = LossSpikeDetector()
        self.total_loss = 0.0
        self.num_updates = self.num_skipped = self.num_overflows = self.num_spikes = 0
        self.consecutive_overflows = self.quiet_until = 0

    @property
    def mean_loss(self) -> float | None:
        """Mean loss of the steps with an update; None without any."""
        return self.total_loss / self.num_updates if self.num_updates else None

    def counts(self) -> dict[str, int]:
        return {
            "num_skipped_steps": self.num_skipped,
            "num_scaler_skips": self.num_overflows,
            "num_loss_spikes": self.num_spikes,
        }

    def allow(self, step: Step) -> bool:
        """Return whether a step may update the weights.

        Raises:
            TrainingError: a non-finite number or a loss spike, and the config says stop.
        """
        if math.isfinite(step.loss) and math.isfinite(step.norm):
            self._check_spike(step)
            self._detector.add(step.loss)
            self.total_loss += step.loss
            self.num_updates += 1
            self.consecutive_overflows = 0
            return True
        if math.isfinite(step.loss) and step.scaled:
            self._count_overflow(step)
        else:
            self._skip(step)
        return False

    def state(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in STATE}, "losses": self._detector.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])
        self._detector.restore(state["losses"])

    def _check_spike(self, step: Step) -> None:
        if self._train.on_loss_spike == "ignore" or dataset_type_of(self._train.objective) != "language_modeling":
            return
        spike = self._detector.detect(step.loss)
        if spike is None:
            return
        message = (
            f"step {step.number}: the loss is {spike.loss:.4f}, after a median of {spike.median:.4f} (limit "
            f"{spike.limit:.4f}); rows of this step: {step.rows()}"
        )
        if self._train.on_loss_spike == "stop":
            raise TrainingError(
                f"{message}; nothing was updated; check these rows; {RESUME}, with train.on_loss_spike=warn past this "
                f"step; or {NEW_RUN}"
            )
        if step.number > self.quiet_until:
            self.num_spikes += 1
            self.quiet_until = step.number + WINDOW_STEPS
            logger.warning(
                "%s; check these rows, or %s if it recurs (next warning in %d steps)", message, NEW_RUN, WINDOW_STEPS
            )

    def _count_overflow(self, step: Step) -> None:
        self.num_overflows += 1
        self.consecutive_overflows += 1
        logger.warning("step %d: gradient overflow in float16, the loss scaler skips the update", step.number)
        if self.consecutive_overflows >= MAX_SCALER_SKIPS:
            raise TrainingError(
                f"step {step.number}: {step.problem}, the {MAX_SCALER_SKIPS}th consecutive overflow in float16; nothing "
                f"was updated; rows of this step: {step.rows()}; use bfloat16 where the hardware has it "
                f"(quantization.bnb_4bit_compute_dtype), or {NEW_RUN}"
            )

    def _skip(self, step: Step) -> None:
        limit = self._train.max_skipped_steps
        if self._train.on_nonfinite == "stop":
            self._stop(step, f"{RESUME}, with train.on_nonfinite=skip past such steps")
        if self.num_skipped >= limit:
            self._stop(step, f"{limit} steps were skipped before, the limit of train.max_skipped_steps")
        self.num_skipped += 1
        logger.warning(
            "step %d: %s (gradient norm %s); step skipped (%d of at most %d); rows of this step: %s",
            step.number, step.problem, step.norm, self.num_skipped, limit, step.rows(),
        )  # fmt: skip

    def _stop(self, step: Step, remedy: str) -> None:
        raise TrainingError(
            f"step {step.number}: {step.problem} (gradient norm {step.norm}); nothing was updated; rows of this step: "
            f"{step.rows()}; check these rows; {remedy}; or {NEW_RUN}"
        )


def check_finite(
    step: int, weights: Mapping[str, nn.Parameter], optimizer_state: Mapping[nn.Parameter, Mapping[str, Any]]
) -> None:
    """Check the state after a step before it is saved.

    Raises:
        TrainingError: names a trained tensor, or a tensor of the optimizer, with a non-finite value.
    """
    of_optimizer = {
        f"the optimizer's {key} of {name}": value
        for name, weight in weights.items()
        for key, value in optimizer_state.get(weight, {}).items()
        if isinstance(value, torch.Tensor)
    }
    problem = find_non_finite({**weights, **of_optimizer})
    if problem is not None:
        raise TrainingError(
            f"step {step}: {problem} after the update; it was not saved; {RESUME}; if it stops here again, {NEW_RUN}"
        )


def check_trained(step: int, weights: Mapping[str, nn.Parameter], *, num_updates: int) -> None:
    """Check that a run made an update and some lora_B is not zero.

    Raises:
        TrainingError: names the step and counts the updates.
    """
    if num_updates and any(bool(weight.any()) for name, weight in weights.items() if "lora_B" in name):
        return
    problem = "every lora_B is zero: the adapter changes nothing" if num_updates else "every step was skipped"
    raise TrainingError(
        f"step {step}: {problem} after {num_updates} updates; the adapter was not written; start a new run with more steps "
        "or another train.learning_rate"
    )


class AdvanceSkippedSchedule(TrainerCallback):
    """Advances the learning rate in steps that the loss scaler skipped, which the Trainer does not."""

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if parts["optimizer"].step_was_skipped:
            parts["lr_scheduler"].step()
