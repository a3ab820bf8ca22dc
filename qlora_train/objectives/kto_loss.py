"""Kahneman-Tversky optimization and `apo_zero_unpaired`: losses of single answers, each marked as desirable or undesirable.

Formulas and metrics are those of TRL's `KTOTrainer`. The reference point of KTO is an estimate of the KL divergence between
policy and reference, from mismatched prompts and answers. TRL estimates it in each micro-batch; here it is the mean over
the rows of the whole optimizer step on all processes, computed before the first micro-batch (`training.step_kl`): the loss
does not depend on how a step is divided.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.objectives.batch_loss import Batch, BatchLoss, model_inputs
from qlora_train.objectives.label_losses import label_losses
from qlora_train.objectives.reference_logps import Reference, reference_logps, sequence_logps
from qlora_train.utils.eval_mode import eval_mode

KL = "kl"
"""Name of the metric, and of a batch's scalar."""
METRICS = (KL, "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
SHOWN = {KL: "KL {:.3f}", "rewards/margins": "margin {:.3f}"}


class KtoLoss:
    """The loss of unpaired preferences; its items are rows.

    Args:
        beta: strength of the regularization towards the reference.
        desirable_weight, undesirable_weight: factors of the losses of either kind.
        estimates_kl: KTO; otherwise `apo_zero_unpaired`, whose reference point is 0.
        reference: makes a model the reference model within a context.
    """

    log_formats: Mapping[str, str] = {
        f"{split}{name}": SHOWN.get(name, "") for split in ("", "eval_") for name in METRICS
    }

    def __init__(
        self,
        *,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
        estimates_kl: bool,
        reference: Reference,
    ) -> None:
        self._beta, self._weights, self.estimates_kl = beta, (undesirable_weight, desirable_weight), estimates_kl
        self.reference = reference

    def num_items(self, batch: Batch) -> int:
        """Return the rows of a micro-batch."""
        return len(batch["desirable"])

    def num_sft_tokens(self, batch: Batch) -> int:
        """Return 0: there is no SFT term."""
        return 0

    def __call__(self, model: nn.Module, batch: Batch, *, chunk_tokens: int | None, with_aux_loss: bool) -> BatchLoss:
        """Return the summed loss of a micro-batch's rows; `batch["kl"]` is the estimate of its step."""
        inputs: dict[str, Any] = model_inputs(batch)
        reference = reference_logps(model, batch, self.reference, chunk_tokens=chunk_tokens)
        policy = label_losses(model, chunk_tokens, with_aux_loss=with_aux_loss, **inputs)
        values = self.row_values(batch, policy.nll, reference, batch.get(KL))
        metrics, counts = _sums(batch, values)
        if self.estimates_kl:
            metrics[KL] = batch[KL] * self.num_items(batch)
        return BatchLoss(values["loss"].sum(), policy.aux_loss, metrics, metric_counts=counts)

    @torch.no_grad()
    def kl_sum(self, model: nn.Module, batch: Batch, *, chunk_tokens: int | None) -> Tensor:
        """Return the summed log-probability ratios of a micro-batch of mismatched sequences, a scalar."""
        inputs: dict[str, Any] = model_inputs(batch)
        reference = reference_logps(model, batch, self.reference, chunk_tokens=chunk_tokens)
        with eval_mode(model):
            policy = label_losses(model, chunk_tokens, **inputs).nll
        return (sequence_logps(policy, batch) - reference).sum()

    def row_values(self, batch: Batch, policy: Tensor, reference: Tensor, kl: Tensor | None) -> dict[str, Tensor]:
        """Return `loss`, `reward` and `logps` of each row, (num_rows,), in the order of the batch.

        Args:
            batch: from `collate_rows`.
            policy: negative log-likelihood of each label token, (num_labels,).
            reference: log-probability of each sequence by the reference model, (num_rows,).
            kl: estimate of the KL divergence, a scalar >= 0; None without one.
        """
        desirable, logps = batch["desirable"].to(policy.device), sequence_logps(policy, batch)
        rewards = self._beta * (logps - reference)
        gain = rewards if kl is None else rewards - self._beta * kl
        undesirable_weight, desirable_weight = self._weights
        losses = torch.where(
            desirable, desirable_weight * (1 - torch.sigmoid(gain)), undesirable_weight * torch.sigmoid(gain)
        )
        return {"loss": losses, "reward": rewards.detach(), "logps": logps.detach()}


def margins(means: Mapping[str, float]) -> dict[str, float]:
    """Return the margin of the mean rewards of both kinds, where there are both: rows have none of their own."""
    if "rewards/chosen" not in means or "rewards/rejected" not in means:
        return {}
    return {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}


def _sums(batch: Batch, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the sums of rewards and log-probabilities over either kind of rows, and the rows of that kind."""
    metrics, counts = {}, {}
    for kind, rows in (("chosen", batch["desirable"]), ("rejected", ~batch["desirable"])):
        if count := int(rows.sum()):
            for name, value in (("rewards", values["reward"]), ("logps", values["logps"])):
                metrics[f"{name}/{kind}"] = value[rows.to(value.device)].sum()
                counts[f"{name}/{kind}"] = count
    return metrics, counts
