"""Loss, rewards and accuracy of preference pairs, of each and as means over held-out rows."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from qlora_train.data.collate import PaddingCollator, collate_rows
from qlora_train.data.types import Example
from qlora_train.evaluation.batched_inference import (
    batches_by_length,
    compute_share_in_batches,
    input_device,
    raise_if_stopped,
)
from qlora_train.evaluation.held_out_loss import MAX_LOGITS, ONE_ROW_ADVICE
from qlora_train.kernels.fsdp_units import is_sharded
from qlora_train.objectives.batch_loss import SFT_LOSS, model_inputs
from qlora_train.objectives.label_losses import label_losses
from qlora_train.objectives.preference_loss import PreferenceLoss
from qlora_train.parallel import context
from qlora_train.utils.eval_mode import eval_mode

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


@torch.no_grad()
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
    lengths, num_labels = [pair.num_tokens for pair in pairs], [pair.num_labels for pair in pairs]
    values: dict[int, dict[str, float]] = {}
    collate, device = PaddingCollator(pad_token_id), input_device(model)

    def values_of(rows: Sequence[int]) -> dict[int, dict[str, float]]:
        raise_if_stopped(model)
        batch = collate_rows(collate, [(row, pairs[row]) for row in sorted(rows)])
        batch |= {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        inputs: dict[str, Any] = model_inputs(batch)
        reference = loss.reference_logps(model, batch)
        found = loss.pair_values(batch, label_losses(model, **inputs).nll, reference)
        named = {"loss": found.loss, **found.metrics, NLL: found.nll, NUM_LABELS: found.num_labels}
        return {
            row: {name: float(value[index]) for name, value in named.items()} for index, row in enumerate(sorted(rows))
        }

    with eval_mode(model):
        compute_share_in_batches(
            batches_by_length(lengths, batch_size, num_labels, MAX_LOGITS // model.config.get_text_config().vocab_size),
            lambda rows: values.update(values_of(rows)), lengths,
            setting="train.per_device_eval_batch_size", advice=ONE_ROW_ADVICE,
            join=values_of if is_sharded(model) else None, task=task,
        )  # fmt: skip
    of_pairs = {row: value for of_rank in context().gather(values) for row, value in of_rank.items()}
    return [of_pairs[row] for row in range(len(pairs))]
