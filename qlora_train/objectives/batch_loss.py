"""The interface of an objective's loss: the tensors of a micro-batch in, a summed loss out.

The trainer divides by the items of the accumulated batch, logs metrics, checks parity and probes memory for every objective
alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""A micro-batch from a collator of `data.collate`."""
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")
"""Tensors of a micro-batch that `label_losses` takes; the others name its rows."""


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The loss of a micro-batch.

    Attributes:
        total: sum over its items, a scalar.
        aux_loss: load-balancing loss of a mixture of experts, a scalar; None unless requested.
        metrics: sums over its items by name, scalars without gradients.
    """

    total: Tensor
    aux_loss: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class LossFunction(Protocol):
    """The loss of an objective, a mean over items such as label tokens."""

    @property
    def log_formats(self) -> Mapping[str, str]:
        """How log lines print each metric; empty: not at all."""

    def num_items(self, batch: Batch) -> int:
        """Return the items of a micro-batch, counted on the host."""

    def __call__(self, model: nn.Module, batch: Batch, *, chunk_tokens: int | None, with_aux_loss: bool) -> BatchLoss:
        """Return the loss of a micro-batch; the options are those of `label_losses`."""


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a micro-batch that `label_losses` takes."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}
