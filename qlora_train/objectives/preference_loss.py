"""Direct preference optimization and its family: losses of pairs from log-probabilities of both answers.

The reference model is the model without what is trained (`reference_logps`). Formulas and metrics are those of TRL's
`DPOTrainer`, whose names for the losses these are, with `dpo` for `sigmoid`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from qlora_train.objectives.batch_loss import Batch, BatchLoss, model_inputs
from qlora_train.objectives.label_losses import label_losses
from qlora_train.objectives.reference_logps import Reference, reference_logps, sequence_logps


@dataclass(frozen=True, slots=True)
class Pairs:
    """Log-probabilities of the answers of pairs: summed over labels, float32 (num_pairs, 2), chosen and rejected."""

    policy: Tensor
    reference: Tensor
    num_labels: Tensor
    """Labels of each answer, (num_pairs, 2)."""

    @property
    def logratios(self) -> Tensor:
        """Log-probability ratios of policy and reference, (num_pairs, 2)."""
        return self.policy - self.reference

    @property
    def mean_logratios(self) -> Tensor:
        """The same per label token."""
        return self.logratios / self.num_labels.clamp(min=1)


PairLoss = Callable[[Pairs, float, float], Tensor]
"""Pairs, beta and label smoothing -> the loss of each pair, (num_pairs,)."""


def _dpo(pairs: Pairs, beta: float, _smoothing: float) -> Tensor:
    return -logsigmoid(beta * _margin(pairs.logratios))


def _ipo(pairs: Pairs, beta: float, _smoothing: float) -> Tensor:
    """Return eq. 17 of the paper on mean log-probabilities, as its authors confirmed to TRL; `beta` is its tau."""
    return (_margin(pairs.mean_logratios) - 1 / (2 * beta)) ** 2


def _hinge(pairs: Pairs, beta: float, _smoothing: float) -> Tensor:
    return torch.relu(1 - beta * _margin(pairs.logratios))


def _robust(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    margin = beta * _margin(pairs.logratios)
    return (smoothing * logsigmoid(-margin) - (1 - smoothing) * logsigmoid(margin)) / (1 - 2 * smoothing)


def _apo_zero(pairs: Pairs, beta: float, _smoothing: float) -> Tensor:
    chosen, rejected = (beta * pairs.logratios).unbind(1)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def _apo_down(pairs: Pairs, beta: float, _smoothing: float) -> Tensor:
    chosen, rejected = (beta * pairs.logratios).unbind(1)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


def _nca_pair(pairs: Pairs, beta: float, _smoothing: float) -> Tensor:
    chosen, rejected = (beta * pairs.logratios).unbind(1)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _sppo_hard(pairs: Pairs, beta: float, _smoothing: float) -> Tensor:
    chosen, rejected = pairs.logratios.unbind(1)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def _sigmoid_norm(pairs: Pairs, beta: float, _smoothing: float) -> Tensor:
    return -logsigmoid(beta * _margin(pairs.mean_logratios))


def _margin(scores: Tensor) -> Tensor:
    return scores[:, 0] - scores[:, 1]


PAIR_LOSSES: Mapping[str, PairLoss] = {
    "dpo": _dpo, "ipo": _ipo, "hinge": _hinge, "robust": _robust, "apo_zero": _apo_zero, "apo_down": _apo_down,
    "nca_pair": _nca_pair, "sppo_hard": _sppo_hard, "sigmoid_norm": _sigmoid_norm,
}  # fmt: skip
METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip
SHOWN = {"rewards/accuracies": "accuracy {:.3f}", "rewards/margins": "margin {:.3f}"}


class PreferenceLoss:
    """The loss of pairs; its items are pairs.

    Args:
        name: of `PAIR_LOSSES`.
        beta: strength of the regularization towards the reference.
        label_smoothing: share of flipped pairs.
        reference: makes a model the reference model within a context.
    """

    log_formats: Mapping[str, str] = {
        f"{split}{name}": SHOWN.get(name, "") for split in ("", "eval_") for name in METRICS
    }

    def __init__(
        self,
        name: str,
        *,
        beta: float,
        label_smoothing: float = 0.0,
        reference: Reference,
    ) -> None:
        self._loss, self._beta, self._label_smoothing = PAIR_LOSSES[name], beta, label_smoothing
        self.reference = reference

    def num_items(self, batch: Batch) -> int:
        """Return the pairs of a micro-batch."""
        return len(batch["sequence"]) // 2

    def __call__(self, model: nn.Module, batch: Batch, *, chunk_tokens: int | None, with_aux_loss: bool) -> BatchLoss:
        """Return the summed loss of a micro-batch's pairs."""
        inputs: dict[str, Any] = model_inputs(batch)
        reference = reference_logps(model, batch, self.reference, chunk_tokens=chunk_tokens)
        policy = label_losses(model, chunk_tokens, with_aux_loss=with_aux_loss, **inputs)
        values = self.pair_values(batch, policy.nll, reference)
        metrics = {name: values[name].detach().sum() for name in METRICS}
        return BatchLoss(values["loss"].sum(), policy.aux_loss, metrics)

    def pair_values(self, batch: Batch, policy: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Return `loss` and METRICS of each pair, (num_pairs,), by ascending row.

        Args:
            batch: from `collate_rows`.
            policy: negative log-likelihood of each label token, (num_labels,).
            reference: log-probability of each sequence by the reference model, (num_sequences,).
        """
        num_labels = _by_pair(batch["num_labels"].to(policy.device), batch)
        pairs = Pairs(_by_pair(sequence_logps(policy, batch), batch), _by_pair(reference, batch), num_labels)
        chosen, rejected = (self._beta * pairs.logratios.detach()).unbind(1)
        values = (chosen, rejected, (chosen > rejected).float(), chosen - rejected, *pairs.policy.detach().unbind(1))
        return {"loss": self._loss(pairs, self._beta, self._label_smoothing), **dict(zip(METRICS, values, strict=True))}


def _by_pair(values: Tensor, batch: Batch) -> Tensor:
    """Return values of sequences, (num_sequences,), as (num_pairs, 2) by ascending row."""
    order = torch.argsort(2 * batch["row"] + batch["sequence"])
    return values[order.to(values.device)].view(-1, 2)
