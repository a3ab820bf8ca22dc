"""A warning when the chosen answers become less likely while the margin to the rejected ones grows.

Losses of pairs see the difference of two log-probabilities only, and fall while both do
(https://arxiv.org/abs/2402.13228). With a reference model the reward says what the log-probability of the same answers was
before training; without one, the first evaluation or the first log lines do.
"""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from qlora_train.config.objectives import OBJECTIVES
from qlora_train.config.schema import TrainSection
from qlora_train.objectives.pair_losses import AVERAGED
from qlora_train.parallel import context

logger = logging.getLogger(__name__)

History = Sequence[Mapping[str, float]]
"""`TrainerState.log_history`."""
WINDOW_LOGS = 8
"""Log lines whose means are compared if no rows are held out."""
MIN_SHARE = 0.1
"""Fall of a log-probability that is worth a warning, as a share of it."""
MIN_NATS, MIN_NATS_PER_TOKEN = 1.0, 0.1
"""Smallest fall of an answer's log-probability, and of one that is a mean over tokens."""
NUM_DEVIATIONS = 3.0
"""Standard errors of the difference between log lines of different pairs."""


@dataclass(frozen=True, slots=True)
class Fall:
    """Mean log-probability of the chosen answers before and now, and the mean margin of the rewards now."""

    before: float
    now: float
    margin: float


@dataclass(frozen=True, slots=True)
class FallRule:
    """When a fall is worth a warning.

    Attributes:
        beta: rewards per nat of the log-probability ratio to the reference model; None without one.
        is_mean: log-probabilities are means over tokens.
        has_eval: held-out pairs are compared, instead of those that are trained on.
    """

    beta: float | None
    is_mean: bool
    has_eval: bool

    def fall(self, history: History) -> Fall | None:
        """Return the fall at the end of a history, if it is worth a warning."""
        logps, rewards, margins = self._series(history)
        size = 1 if self.has_eval else WINDOW_LOGS
        if len(logps) < (size if self.beta is not None else 2 * size):
            return None
        now, margin = statistics.fmean(logps[-size:]), statistics.fmean(margins[-size:])
        noise = 0.0
        if self.beta is not None:  # the same answers by the reference model
            before, margin_before = now - statistics.fmean(rewards[-size:]) / self.beta, 0.0
        else:
            before, margin_before = statistics.fmean(logps[:size]), statistics.fmean(margins[:size])
            if size > 1:  # other pairs
                noise = math.sqrt((statistics.variance(logps[:size]) + statistics.variance(logps[-size:])) / size)
        smallest = max(
            MIN_NATS_PER_TOKEN if self.is_mean else MIN_NATS, MIN_SHARE * abs(before), NUM_DEVIATIONS * noise
        )
        warns = before - now >= smallest and margin > margin_before
        return Fall(before, now, margin) if warns else None

    def has_fallen(self, history: History) -> bool:
        """Return whether any entry of a history was worth a warning."""
        entries, size = [entry for entry in history if self._names[0] in entry], WINDOW_LOGS
        return any(  # on the first and last entries only, the same in linear time
            self.fall([*entries[: min(size, end)], *entries[max(size, end - size) : end]]) is not None
            for end in range(1, len(entries) + 1)
        )

    @property
    def _names(self) -> list[str]:
        prefix = "eval_" if self.has_eval else ""
        return [f"{prefix}{name}" for name in ("logps/chosen", "rewards/chosen", "rewards/margins")]

    def _series(self, history: History) -> tuple[list[float], ...]:
        names = self._names
        entries = [entry for entry in history if names[0] in entry]
        return tuple([entry[name] for entry in entries] for name in names)


class ChosenLogpCallback(TrainerCallback):
    """Warns once in a run, also if it is resumed."""

    def __init__(self, train: TrainSection, *, has_eval: bool) -> None:
        row = OBJECTIVES[train.objective]
        beta = row.settings(train)["beta"] if row.uses_reference else None
        is_mean = train.objective in AVERAGED
        self._rule = FallRule(beta, is_mean, has_eval)
        self._unit = " per token" if is_mean else ""
        self._advice = "train.beta or train.sft_weight" if row.uses_reference else "train.sft_weight"
        self._compared = "held-out pairs" if has_eval else f"the last {WINDOW_LOGS} log lines"
        self._has_warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Look whether the run has warned before its checkpoint."""
        self._has_warned = self._rule.has_fallen(state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        if self._has_warned or not context().is_main:
            return
        fall = self._rule.fall(state.log_history)
        if fall is not None:
            self._has_warned = True
            logger.warning(
                "training: the chosen answers' log-probability fell from %.4g to %.4g%s while the margin grew to %.3g "
                "(%s): both answers become less likely; raise %s, or lower train.learning_rate",
                fall.before, fall.now, self._unit, fall.margin, self._compared, self._advice,
            )  # fmt: skip
