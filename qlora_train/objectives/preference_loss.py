"""Preference training: the loss of pairs of a chosen and a rejected answer to the same prompt.

The reference model is the model without what is trained (`reference_logps`). Metrics are those of TRL's `DPOTrainer` and
`CPOTrainer`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.objectives.batch_loss import Batch, BatchLoss, model_inputs
from qlora_train.objectives.label_losses import label_losses
from qlora_train.objectives.pair_losses import AVERAGED, PAIR_LOSSES, Pairs, PairSettings
from qlora_train.objectives.reference_logps import Reference, reference_logps, sequence_logps

METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip
SHOWN = {"rewards/accuracies": "accuracy {:.3f}", "rewards/margins": "margin {:.3f}"}


class PreferenceLoss:
    """The loss of pairs; its items are pairs.

    Args:
        name: of `PAIR_LOSSES`.
        reference: None for an objective without a reference model.
        settings: fields of `PairSettings`.
    """

    log_formats: Mapping[str, str] = {
        f"{split}{name}": SHOWN.get(name, "") for split in ("", "eval_") for name in METRICS
    }

    def __init__(self, name: str, *, reference: Reference | None, **settings: float) -> None:
        self._loss, self._settings, self._averages = PAIR_LOSSES[name], PairSettings(**settings), name in AVERAGED
        self.reference = reference

    def num_items(self, batch: Batch) -> int:
        """Return the pairs of a micro-batch."""
        return len(batch["sequence"]) // 2

    def __call__(self, model: nn.Module, batch: Batch, *, chunk_tokens: int | None, with_aux_loss: bool) -> BatchLoss:
        """Return the summed loss of a micro-batch's pairs."""
        inputs: dict[str, Any] = model_inputs(batch)
        reference = self.reference_logps(model, batch, chunk_tokens=chunk_tokens)
        policy = label_losses(model, chunk_tokens, with_aux_loss=with_aux_loss, **inputs)
        values = self.pair_values(batch, policy.nll, reference)
        metrics = {name: values[name].detach().sum() for name in METRICS}
        return BatchLoss(values["loss"].sum(), policy.aux_loss, metrics)

    def reference_logps(self, model: nn.Module, batch: Batch, *, chunk_tokens: int | None = None) -> Tensor | None:
        """Return the reference model's log-probability of each sequence, (num_sequences,); None without a reference."""
        if self.reference is None:
            return None
        return reference_logps(model, batch, self.reference, chunk_tokens=chunk_tokens)

    def pair_values(self, batch: Batch, policy: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
        """Return `loss` and METRICS of each pair, (num_pairs,), by ascending row.

        Args:
            batch: from `collate_rows`.
            policy: negative log-likelihood of each label token, (num_labels,).
            reference: from `reference_logps`.
        """
        pairs = self._pairs(batch, sequence_logps(policy, batch), reference)
        chosen, rejected = (self._settings.beta * pairs.logratios.detach()).unbind(1)
        values = (chosen, rejected, (chosen > rejected).float(), chosen - rejected, *pairs.policy.detach().unbind(1))
        return {"loss": self._loss(pairs, self._settings), **dict(zip(METRICS, values, strict=True))}

    def _pairs(self, batch: Batch, policy: Tensor, reference: Tensor | None) -> Pairs:
        reference = torch.zeros_like(policy) if reference is None else reference
        num_labels = batch["num_labels"].to(policy.device)
        if self._averages:
            policy, reference = policy / num_labels, reference / num_labels
        return Pairs(*(_by_pair(each, batch) for each in (policy, reference, num_labels)))


def _by_pair(values: Tensor, batch: Batch) -> Tensor:
    """Return values of sequences, (num_sequences,), as (num_pairs, 2) by ascending row."""
    order = torch.argsort(2 * batch["row"] + batch["sequence"])
    return values[order.to(values.device)].view(-1, 2)
