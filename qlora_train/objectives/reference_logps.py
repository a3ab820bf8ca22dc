"""Log-probabilities of sequences under the reference model: those of the batch, else computed with the adapter switched."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.kernels import host_copies
from qlora_train.objectives.batch_loss import Batch, model_inputs
from qlora_train.objectives.label_losses import label_losses
from qlora_train.utils.eval_mode import eval_mode

Reference = Callable[[Any], AbstractContextManager[None]]
"""Makes a model the reference model within a context (`adapters.reference_model`)."""


@torch.no_grad()
def reference_logps(model: nn.Module, batch: Batch, reference: Reference, *, chunk_tokens: int | None = None) -> Tensor:
    """Return the reference model's log-probability of each sequence, summed over its labels, float32 (num_sequences,).

    Sequences are in the order of the batch's labels. Without `reference_logps` in the batch this is a forward pass, without
    dropout and NEFTune's noise; call it before the policy's, since fused kernels share activations until the next forward.

    Args:
        batch: from `collate_rows`.
        reference: makes `model` the reference model.
        chunk_tokens: of `label_losses`.
    """
    if "reference_logps" in batch:
        return host_copies.to_device(batch["reference_logps"], batch["input_ids"].device)
    inputs: dict[str, Any] = model_inputs(batch)
    with eval_mode(model), reference(model):
        return sequence_logps(label_losses(model, chunk_tokens, **inputs).nll, batch)


def sequence_logps(nll: Tensor, batch: Batch) -> Tensor:
    """Return the log-probability of each sequence, (num_sequences,), from the loss of each label token, (num_labels,)."""
    parts = nll.split(batch["num_labels"].tolist())  # sums in a fixed order, unlike index_add on a GPU
    return -torch.stack([part.sum() for part in parts])
