"""Losses of preference pairs from the log-probabilities of both answers.

Formulas and names are those of TRL's `DPOTrainer`, `CPOTrainer` and `ORPOTrainer`, with `dpo` for `sigmoid`, and `cpo` for
that of `CPOTrainer`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class Pairs:
    """Log-probabilities of the answers of pairs, float32 (num_pairs, 2), chosen and rejected.

    They are summed over labels, or for an objective of `AVERAGED` means over labels.
    """

    policy: Tensor
    reference: Tensor
    """Zeros without a reference model."""
    num_labels: Tensor
    """Labels of each answer, (num_pairs, 2)."""

    @property
    def logratios(self) -> Tensor:
        """Log-probability ratios of policy and reference, (num_pairs, 2)."""
        return self.policy - self.reference

    @property
    def mean_logratios(self) -> Tensor:
        """The same per label token, of sums."""
        return self.logratios / self.num_labels.clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings:
    """Settings of the formulas: the fields of `train` of the same names."""

    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.0
    discopop_tau: float = 0.0


PairLoss = Callable[[Pairs, PairSettings], Tensor]
"""Returns the loss of each pair, (num_pairs,)."""


def _dpo(pairs: Pairs, settings: PairSettings) -> Tensor:
    return -logsigmoid(settings.beta * _margin(pairs.logratios))


def _ipo(pairs: Pairs, settings: PairSettings) -> Tensor:
    """Return eq. 17 of the paper on mean log-probabilities, as its authors confirmed to TRL; `beta` is its tau."""
    return (_margin(pairs.mean_logratios) - 1 / (2 * settings.beta)) ** 2


def _hinge(pairs: Pairs, settings: PairSettings) -> Tensor:
    return torch.relu(1 - settings.beta * _margin(pairs.logratios))


def _robust(pairs: Pairs, settings: PairSettings) -> Tensor:
    margin, smoothing = settings.beta * _margin(pairs.logratios), settings.label_smoothing
    return (smoothing * logsigmoid(-margin) - (1 - smoothing) * logsigmoid(margin)) / (1 - 2 * smoothing)


def _apo_zero(pairs: Pairs, settings: PairSettings) -> Tensor:
    chosen, rejected = (settings.beta * pairs.logratios).unbind(1)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def _apo_down(pairs: Pairs, settings: PairSettings) -> Tensor:
    chosen, rejected = (settings.beta * pairs.logratios).unbind(1)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


def _nca_pair(pairs: Pairs, settings: PairSettings) -> Tensor:
    chosen, rejected = (settings.beta * pairs.logratios).unbind(1)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _sppo_hard(pairs: Pairs, settings: PairSettings) -> Tensor:
    chosen, rejected = pairs.logratios.unbind(1)
    return (chosen - 0.5 / settings.beta) ** 2 + (rejected + 0.5 / settings.beta) ** 2


def _sigmoid_norm(pairs: Pairs, settings: PairSettings) -> Tensor:
    return -logsigmoid(settings.beta * _margin(pairs.mean_logratios))


def _exo_pair(pairs: Pairs, settings: PairSettings) -> Tensor:
    """Return eq. 16 of the paper for two answers: the KL divergence from softmax(rewards) to (1 - smoothing, smoothing)."""
    margin, smoothing = settings.beta * _margin(pairs.logratios), settings.label_smoothing
    chosen = torch.sigmoid(margin) * (logsigmoid(margin) - math.log1p(-smoothing))
    return chosen + torch.sigmoid(-margin) * (logsigmoid(-margin) - math.log(smoothing))


def _bco_pair(pairs: Pairs, settings: PairSettings) -> Tensor:
    chosen, rejected = (settings.beta * pairs.logratios).unbind(1)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def _discopop(pairs: Pairs, settings: PairSettings) -> Tensor:
    margin = settings.beta * _margin(pairs.logratios)
    exponential_share = torch.sigmoid(margin / settings.discopop_tau)
    # the share of exp(-margin), without infinity times 0
    exponential = torch.exp(logsigmoid(margin / settings.discopop_tau) - margin)
    return (exponential_share - 1) * logsigmoid(margin) + exponential


def _cpo(pairs: Pairs, settings: PairSettings) -> Tensor:
    return _smoothed(settings.beta * _margin(pairs.policy), settings.label_smoothing)


def _orpo(pairs: Pairs, settings: PairSettings) -> Tensor:
    return -settings.beta * logsigmoid(_margin(_log_odds(pairs)))


def odds_metrics(pairs: Pairs) -> dict[str, Tensor]:
    """Return TRL's metrics of the odds ratio, (num_pairs,)."""
    ratio = _margin(_log_odds(pairs))
    return {"log_odds_ratio": logsigmoid(ratio), "log_odds_chosen": ratio}


def _log_odds(pairs: Pairs) -> Tensor:
    """Return log(p / (1 - p)) of mean log-probabilities log p, (num_pairs, 2)."""
    logps = pairs.policy.clamp(max=MAX_MEAN_LOGP)
    return logps - torch.log(-torch.expm1(logps))


def _simpo(pairs: Pairs, settings: PairSettings) -> Tensor:
    return _smoothed(settings.beta * _margin(pairs.policy) - settings.simpo_gamma, settings.label_smoothing)


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """Return the sigmoid loss of margins, of which a share `label_smoothing` is expected to be flipped."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def _margin(scores: Tensor) -> Tensor:
    return scores[:, 0] - scores[:, 1]


PAIR_LOSSES: Mapping[str, PairLoss] = {
    "dpo": _dpo, "ipo": _ipo, "hinge": _hinge, "robust": _robust, "apo_zero": _apo_zero, "apo_down": _apo_down,
    "nca_pair": _nca_pair, "sppo_hard": _sppo_hard, "sigmoid_norm": _sigmoid_norm, "exo_pair": _exo_pair,
    "bco_pair": _bco_pair, "discopop": _discopop, "simpo": _simpo, "cpo": _cpo, "orpo": _orpo,
}  # fmt: skip
AVERAGED = ("simpo", "orpo")
"""Objectives whose log-probabilities are means over labels, also in metrics."""
MAX_MEAN_LOGP = -1e-12
"""An answer whose tokens all have probability 1 has infinite odds, and a gradient of NaN."""
