"""Supervised fine-tuning: the mean negative log-likelihood of the label tokens."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qlora_train.objectives.batch_loss import Batch, BatchLoss, model_inputs
from qlora_train.objectives.label_losses import label_losses
from qlora_train.utils.constants import IGNORE_INDEX


class SftLoss:
    """Negative log-likelihood; its items are label tokens."""

    log_formats: Mapping[str, str] = {}

    def num_items(self, batch: Batch) -> int:
        """Return the label tokens of a micro-batch."""
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def num_sft_tokens(self, batch: Batch) -> int:
        """Return 0: the loss has no second term."""
        return 0

    def __call__(self, model: nn.Module, batch: Batch, *, chunk_tokens: int | None, with_aux_loss: bool) -> BatchLoss:
        """Return the summed negative log-likelihood of a micro-batch, in nats."""
        inputs: dict[str, Any] = model_inputs(batch)
        losses = label_losses(model, chunk_tokens, with_aux_loss=with_aux_loss, **inputs)
        return BatchLoss(losses.nll.sum(), losses.aux_loss)
