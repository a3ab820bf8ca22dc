"""Loss, rewards and accuracy of preference pairs, of each and as means over held-out rows."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from qlora_train.data.collate import Batch
from qlora_train.data.types import Example
from qlora_train.evaluation.row_batches import compute_row_batches
from qlora_train.objectives.batch_loss import SFT_LOSS, model_inputs
from qlora_train.objectives.label_losses import label_losses
from qlora_train.objectives.preference_loss import PreferenceLoss
from qlora_train.parallel import context

NLL, NUM_LABELS = "nll", "num_labels"
"""Sums of the chosen answer."""


def evaluate_preferences(
    loss: PreferenceLoss, model: Any, pairs: Sequence[Example], *, batch_size: int, pad_token_id: int
) -> dict[str, float]:
    """Return the means of metrics over pairs, and `loss`, whose SFT term is a mean over tokens; raises as `pair_values`."""
    values = pair_values(loss, model, pairs, batch_size=batch_size, pad_token_id=pad_token_id)
    sums = {name: math.fsum(each[name] for each in values) for name in values[0]}
    nll = sums.pop(NLL) / sums.pop(NUM_LABELS)
    means = {name: value / len(pairs) for name, value in sums.items()}
    if loss.sft_weight:
        means["loss"] += loss.sft_weight * nll
        means[SFT_LOSS] = nll
    return means


def preference_losses(
    loss: PreferenceLoss, model: Any, pairs: Sequence[Example], *, batch_size: int, pad_token_id: int
) -> list[float]:
    """Return the loss of each pair, with the SFT term of its own tokens; raises as `pair_values`."""
    values = pair_values(loss, model, pairs, batch_size=batch_size, pad_token_id=pad_token_id, task="row losses")
    return [each["loss"] + loss.sft_weight * each[NLL] / each[NUM_LABELS] for each in values]


def pair_values(
    loss: PreferenceLoss,
    model: Any,
    pairs: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
    task: str = "evaluation",
) -> list[dict[str, float]]:
    """Return `loss`, its metrics, NLL and NUM_LABELS of each pair, in order; the model's training mode is restored.

    Args:
        task: name of the work, for its progress.

    Raises:
        ModelError: a single pair does not fit into memory.
        Stop: a signal asked the process to stop.
    """
    values: dict[int, dict[str, float]] = {}

    def compute(batch: Batch) -> dict[str, torch.Tensor]:
        inputs: dict[str, Any] = model_inputs(batch)
        reference = loss.reference_logps(model, batch)
        found = loss.pair_values(batch, label_losses(model, **inputs).nll, reference)
        return {"loss": found.loss, **found.metrics, NLL: found.nll, NUM_LABELS: found.num_labels}

    def use(batch: Batch, found: dict[str, torch.Tensor]) -> None:
        of_names = {name: value.tolist() for name, value in found.items()}
        for index, row in enumerate(sorted(set(batch["row"].tolist()))):
            values[row] = {name: float(of_name[index]) for name, of_name in of_names.items()}

    compute_row_batches(model, pairs, compute, use, batch_size=batch_size, pad_token_id=pad_token_id, task=task)
    of_pairs = {row: value for of_rank in context().gather(values) for row, value in of_rank.items()}
    return [of_pairs[row] for row in range(len(pairs))]
