"""Log-probabilities of rows under the reference model, in the batches in which evaluation computes the policy's."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from qlora_train.data.collate import Batch
from qlora_train.data.types import Example, LogpArray
from qlora_train.evaluation.row_batches import compute_row_batches
from qlora_train.objectives.reference_logps import Reference, reference_logps
from qlora_train.parallel import context


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
    values = np.full((len(rows), len(rows[0].sequences)), np.nan, np.float32)
    compute_row_batches(
        model, rows, lambda batch: reference_logps(model, batch, reference), partial(set_values, values),
        batch_size=batch_size, pad_token_id=pad_token_id, task=task,
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
