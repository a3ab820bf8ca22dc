"""Log-probabilities of rows under the reference model, in the batches in which evaluation computes the policy's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qlora_train.data.collate import Batch, PaddingCollator, collate_rows
from qlora_train.data.types import Example, LogpArray
from qlora_train.evaluation.batched_inference import (
    batches_by_length,
    compute_share_in_batches,
    input_device,
    raise_if_stopped,
)
from qlora_train.evaluation.held_out_loss import MAX_LOGITS, ONE_ROW_ADVICE
from qlora_train.kernels.fsdp_units import is_sharded
from qlora_train.objectives.reference_logps import Reference, reference_logps
from qlora_train.parallel import context
from qlora_train.utils.eval_mode import eval_mode


@torch.no_grad()
def compute_reference_logps(
    model: Any, reference: Reference, rows: Sequence[Example], *, batch_size: int, pad_token_id: int, task: str
) -> LogpArray:
    """Return the log-probabilities of rows; the model's training mode is restored.

    Args:
        reference: makes `model` the reference model.
        task: name of the work, for its progress.

    Raises:
        ModelError: a single row does not fit into memory.
        Stop: a signal asked the process to stop.
    """
    lengths, num_labels = [row.num_tokens for row in rows], [row.num_labels for row in rows]
    collate, device = PaddingCollator(pad_token_id), input_device(model)
    values = np.full((len(rows), len(rows[0].sequences)), np.nan, np.float32)

    def compute(indices: Sequence[int]) -> tuple[Batch, torch.Tensor]:
        raise_if_stopped(model)
        batch = collate_rows(collate, [(index, rows[index]) for index in sorted(indices)])
        batch |= {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        return batch, reference_logps(model, batch, reference)

    with eval_mode(model):
        compute_share_in_batches(
            batches_by_length(lengths, batch_size, num_labels, MAX_LOGITS // model.config.get_text_config().vocab_size),
            lambda indices: set_values(values, *compute(indices)), lengths,
            setting="train.per_device_eval_batch_size", advice=ONE_ROW_ADVICE,
            join=compute if is_sharded(model) else None, task=task,
        )  # fmt: skip
    return join_ranks(values)


def set_values(values: LogpArray, batch: Batch, logps: torch.Tensor) -> None:
    """Write the log-probabilities of a batch's sequences, (num_sequences,), at their rows."""
    sequence = batch["sequence"].numpy() if "sequence" in batch else 0
    values[batch["row"].numpy(), sequence] = logps.float().cpu().numpy()


def join_ranks(values: LogpArray) -> LogpArray:
    """Return what all ranks computed; NaN where none did."""
    joined = np.full_like(values, np.nan)
    for of_rank in context().gather(values):
        np.copyto(joined, of_rank, where=~np.isnan(of_rank))
    return joined
