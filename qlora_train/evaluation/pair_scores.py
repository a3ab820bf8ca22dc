"""How models rank held-out preference pairs, by the exact log-probabilities of both answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qlora_train.data.types import Example
from qlora_train.evaluation.held_out_loss import HeldOutLoss, held_out_loss

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of the answers of pairs under a model, summed over label tokens.

    Attributes:
        logps: float64 (num_pairs, 2), chosen and rejected.
        num_labels: label tokens of the answers, (num_pairs, 2).
    """

    logps: Array
    num_labels: Array

    @classmethod
    def of(cls, chosen: HeldOutLoss, rejected: HeldOutLoss) -> Self:
        """Return the log-probabilities of answers whose losses were measured."""
        both = list(zip(chosen.per_example, rejected.per_example, strict=True))
        logps = np.array([[-each.nll for each in pair] for pair in both])
        return cls(logps, np.array([[each.num_tokens for each in pair] for pair in both], np.float64))

    def scores(self) -> dict[str, float]:
        """Return the share of pairs whose chosen answer has the higher log-probability, and the mean difference in nats.

        `win_rate` and `logp_margin` are of sums, `win_rate_per_token` is of means over label tokens.
        """
        margins, per_token = _margins(self.logps), _margins(self.logps / self.num_labels)
        return {
            "win_rate": float(np.mean(margins > 0)),
            "win_rate_per_token": float(np.mean(per_token > 0)),
            "logp_margin": float(margins.mean()),
        }

    def rewards(self, reference: Self, beta: float) -> dict[str, float]:
        """Return accuracy and margin of the implicit rewards, ``beta * (logps - reference)``."""
        margins = beta * _margins(self.logps - reference.logps)
        return {"reward_accuracy": float(np.mean(margins > 0)), "reward_margin": float(margins.mean())}


def _margins(values: Array) -> Array:
    margins: Array = values[:, 0] - values[:, 1]
    return margins


def measure_pairs(
    model: Any, pairs: Sequence[Example], chosen: HeldOutLoss, *, batch_size: int, pad_token_id: int
) -> PairLogps:
    """Return the log-probabilities of pairs, given the loss of their chosen answers; raises as `held_out_loss`."""
    rejected = [pair.rejected for pair in pairs if pair.rejected is not None]
    measured = held_out_loss(
        model, rejected, batch_size=batch_size, pad_token_id=pad_token_id, task="evaluation of rejected answers"
    )
    return PairLogps.of(chosen, measured)
