"""Preference training: the loss of pairs of a chosen and a rejected answer to the same prompt.

The reference model is the model without what is trained (`reference_logps`). Metrics are those of TRL's `DPOTrainer`,
`CPOTrainer` and `ORPOTrainer`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.objectives.batch_loss import SFT_LOSS, Batch, BatchLoss, model_inputs
from qlora_train.objectives.label_losses import label_losses
from qlora_train.objectives.pair_losses import AVERAGED, PAIR_LOSSES, Pairs, PairSettings, odds_metrics
from qlora_train.objectives.reference_logps import Reference, reference_logps, sequence_logps

METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip
ODDS_METRICS = ("log_odds_ratio", "log_odds_chosen")
SHOWN = {"rewards/accuracies": "accuracy {:.3f}", "rewards/margins": "margin {:.3f}", SFT_LOSS: "nll {:.4f}"}


@dataclass(frozen=True, slots=True)
class PairValues:
    """Values of pairs, (num_pairs,) each, by ascending row.

    Attributes:
        loss: without the SFT term.
        nll: negative log-likelihood of the chosen answer, summed over its label tokens.
        num_labels: label tokens of the chosen answer.
        metrics: by name, without gradients.
    """

    loss: Tensor
    nll: Tensor
    num_labels: Tensor
    metrics: Mapping[str, Tensor]


class PreferenceLoss:
    """The loss of pairs; its items are pairs.

    Args:
        name: of `PAIR_LOSSES`.
        reference: None for an objective without a reference model.
        sft_weight: weight of the mean negative log-likelihood of the chosen answers' label tokens, which is added.
        settings: fields of `PairSettings`.
    """

    log_formats: Mapping[str, str] = {
        f"{split}{name}": SHOWN.get(name, "") for split in ("", "eval_") for name in (*METRICS, SFT_LOSS, *ODDS_METRICS)
    }

    def __init__(self, name: str, *, reference: Reference | None, sft_weight: float = 0.0, **settings: float) -> None:
        self._name, self._settings = name, PairSettings(**settings)
        self.reference, self.sft_weight = reference, sft_weight

    def num_items(self, batch: Batch) -> int:
        """Return the pairs of a micro-batch."""
        return len(batch["sequence"]) // 2

    def num_sft_tokens(self, batch: Batch) -> int:
        """Return the label tokens of the chosen answers; 0 without an SFT term."""
        return int(batch["num_labels"][batch["sequence"] == 0].sum()) if self.sft_weight else 0

    def __call__(self, model: nn.Module, batch: Batch, *, chunk_tokens: int | None, with_aux_loss: bool) -> BatchLoss:
        """Return the summed loss of a micro-batch's pairs."""
        inputs: dict[str, Any] = model_inputs(batch)
        reference = self.reference_logps(model, batch, chunk_tokens=chunk_tokens)
        policy = label_losses(model, chunk_tokens, with_aux_loss=with_aux_loss, **inputs)
        values = self.pair_values(batch, policy.nll, reference)
        metrics = {name: value.sum() for name, value in values.metrics.items()}
        sft_nll = values.nll.sum() if self.sft_weight else None
        return BatchLoss(values.loss.sum(), policy.aux_loss, metrics, sft_nll, self.sft_weight)

    def reference_logps(self, model: nn.Module, batch: Batch, *, chunk_tokens: int | None = None) -> Tensor | None:
        """Return the reference model's log-probability of each sequence, (num_sequences,); None without a reference."""
        if self.reference is None:
            return None
        return reference_logps(model, batch, self.reference, chunk_tokens=chunk_tokens)

    def pair_values(self, batch: Batch, policy: Tensor, reference: Tensor | None) -> PairValues:
        """Return the losses and metrics of pairs.

        Args:
            batch: from `collate_rows`.
            policy: negative log-likelihood of each label token, (num_labels,).
            reference: from `reference_logps`.
        """
        logps, num_labels = sequence_logps(policy, batch), batch["num_labels"].to(policy.device)
        nll, reference = -logps, torch.zeros_like(logps) if reference is None else reference
        if self._name in AVERAGED:
            logps, reference = logps / num_labels, reference / num_labels
        nll, logps, reference, num_labels = (_by_pair(each, batch) for each in (nll, logps, reference, num_labels))
        pairs = Pairs(logps, reference, num_labels)
        loss = PAIR_LOSSES[self._name](pairs, self._settings)
        return PairValues(loss, nll[:, 0], num_labels[:, 0], self._metrics(pairs))

    @torch.no_grad()
    def _metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        chosen, rejected = (self._settings.beta * pairs.logratios).unbind(1)
        values = (chosen, rejected, (chosen > rejected).float(), chosen - rejected, *pairs.policy.unbind(1))
        odds = odds_metrics(pairs) if self._name == "orpo" else {}
        return dict(zip(METRICS, values, strict=True)) | odds


def _by_pair(values: Tensor, batch: Batch) -> Tensor:
    """Return values of sequences, (num_sequences,), as (num_pairs, 2) by ascending row."""
    order = torch.argsort(2 * batch["row"] + batch["sequence"])
    return values[order.to(values.device)].view(-1, 2)
