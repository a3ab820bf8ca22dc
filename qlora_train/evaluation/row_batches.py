"""Preference rows in padded batches, each rank its share; batches halve where memory runs out."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from qlora_train.data.collate import Batch, PaddingCollator, collate_rows
from qlora_train.data.types import Example
from qlora_train.evaluation.batched_inference import (
    batches_by_length,
    compute_share_in_batches,
    input_device,
    raise_if_stopped,
)
from qlora_train.evaluation.held_out_loss import MAX_LOGITS, ONE_ROW_ADVICE
from qlora_train.kernels.fsdp_units import is_sharded
from qlora_train.utils.eval_mode import eval_mode

Result = TypeVar("Result")


@torch.no_grad()
def compute_row_batches(
    model: Any,
    rows: Sequence[Example],
    compute: Callable[[Batch], Result],
    use: Callable[[Batch, Result], Any],
    *,
    batch_size: int,
    pad_token_id: int,
    task: str,
) -> None:
    """Compute batches of this rank's share of the rows; the model's training mode is restored.

    Args:
        compute: of a batch from `collate_rows`, its rows ascending and its inputs on the model's device.
        use: called once for each batch of the share.
        task: name of the work, for its progress.

    Raises:
        ModelError: a single row does not fit into memory.
        Stop: a signal asked the process to stop.
    """
    lengths, num_labels = [row.num_tokens for row in rows], [row.num_labels for row in rows]
    collate, device = PaddingCollator(pad_token_id), input_device(model)

    def computed(indices: Sequence[int]) -> tuple[Batch, Result]:
        raise_if_stopped(model)
        batch = collate_rows(collate, [(index, rows[index]) for index in sorted(indices)])
        batch |= {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        return batch, compute(batch)

    with eval_mode(model):
        compute_share_in_batches(
            batches_by_length(lengths, batch_size, num_labels, MAX_LOGITS // model.config.get_text_config().vocab_size),
            lambda indices: use(*computed(indices)), lengths,
            setting="train.per_device_eval_batch_size", advice=ONE_ROW_ADVICE,
            join=computed if is_sharded(model) else None, task=task,
        )  # fmt: skip
