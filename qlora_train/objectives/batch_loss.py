"""The interface of an objective's loss: the tensors of a micro-batch in, a summed loss out.

The trainer divides by the items of the accumulated batch, logs metrics, checks parity and probes memory for every objective
alike. A loss may have a second term, the mean negative log-likelihood of some label tokens (SFT term): tokens of a step are
counted over all of its micro-batches and ranks as items are, so that their division changes no gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""A micro-batch from a collator of `data.collate`."""
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")
"""Tensors of a micro-batch that `label_losses` takes; the others name its rows."""
SFT_LOSS = "nll_loss"
"""The name of the SFT term, without its weight, in metrics."""


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The loss of a micro-batch.

    Attributes:
        total: sum over its items, a scalar.
        aux_loss: load-balancing loss of a mixture of experts, a scalar; None unless requested.
        metrics: sums over its items by name, scalars without gradients.
        sft_nll: negative log-likelihood summed over the label tokens of the SFT term, a scalar; None without the term.
        sft_weight: weight of its mean.
        metric_counts: items that a metric is summed over, where those are not all.
    """

    total: Tensor
    aux_loss: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    sft_nll: Tensor | None = None
    sft_weight: float = 0.0
    metric_counts: Mapping[str, int] = field(default_factory=dict)

    def mean(self, num_items: int, num_sft_tokens: int) -> Tensor:
        """Return the loss of a micro-batch with so many items and tokens of the SFT term."""
        return self.total / num_items + self.sft_term(num_sft_tokens)

    def sft_term(self, num_sft_tokens: int) -> Tensor | float:
        """Return this micro-batch's share of the weighted SFT term of a step with so many tokens of it."""
        return 0.0 if self.sft_nll is None else self.sft_weight * self.sft_nll / num_sft_tokens


class LossFunction(Protocol):
    """The loss of an objective, a mean over items such as label tokens."""

    @property
    def log_formats(self) -> Mapping[str, str]:
        """How log lines print each metric; empty: not at all."""

    def num_items(self, batch: Batch) -> int:
        """Return the items of a micro-batch, counted on the host."""

    def num_sft_tokens(self, batch: Batch) -> int:
        """Return the label tokens of a micro-batch's SFT term, counted on the host; 0 without the term."""

    def __call__(self, model: nn.Module, batch: Batch, *, chunk_tokens: int | None, with_aux_loss: bool) -> BatchLoss:
        """Return the loss of a micro-batch; the options are those of `label_losses`."""


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a micro-batch that `label_losses` takes."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}
