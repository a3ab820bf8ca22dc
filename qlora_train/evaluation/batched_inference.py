"""Compute rows in batches of similar length, and in smaller batches where memory runs out."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from qlora_train.utils.device import catch_out_of_memory
from qlora_train.utils.errors import ModelError

logger = logging.getLogger(__name__)


def batches_by_length(
    lengths: Sequence[int], batch_size: int, num_labels: Sequence[int] = (), max_labels: int = 0
) -> Iterator[list[int]]:
    """Yield row indices in batches of similar length, longest first, so that a batch too large for memory fails at once.

    Args:
        lengths: tokens of each row.
        batch_size: most rows of a batch.
        num_labels: labels of each row; when given, a batch of several rows has at most `max_labels` in all.
    """
    labels = num_labels or [0] * len(lengths)
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if len(batch) == batch_size or (batch and sum(labels[i] for i in (*batch, index)) > max_labels):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def compute_in_batches(
    batches: Iterable[list[int]],
    compute: Callable[[list[int]], None],
    lengths: Sequence[int],
    *,
    setting: str,
    advice: str,
) -> None:
    """Call `compute` with every batch; where memory runs out, retry with half the rows and keep to as many tokens.

    Args:
        batches: row indices, as `batches_by_length` yields them.
        compute: takes row indices; keeps no result of a call that fails.
        lengths: tokens of each row at the end of its computation, new tokens included.
        setting: the batch size as the user sets it, for messages.
        advice: what to do about a row that does not fit by itself.

    Raises:
        ModelError: one row does not fit into memory.
    """
    max_tokens = math.inf
    for batch in batches:
        left = batch
        while left:
            length = lengths[left[0]]
            rows = left[: int(max(1, min(len(left), max_tokens // length)))]
            _, reason = catch_out_of_memory(partial(compute, rows))
            if reason is None:
                left = left[len(rows) :]
                continue
            if len(rows) == 1:
                raise row_too_long(length, reason, f"{setting} is down to 1; {advice}")
            max_tokens = len(rows) // 2 * length
            logger.warning(
                "memory: %d x %d tokens do not fit, retries with %d rows (%s; lower %s)",
                len(rows), length, len(rows) // 2, reason, setting,
            )  # fmt: skip


def row_too_long(num_tokens: int, reason: str | None, advice: str) -> ModelError:
    """Return the error for one row that does not fit into memory by itself."""
    return ModelError(f"out of memory: one row of {num_tokens} tokens does not fit ({reason}); {advice}")


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Put every module into evaluation mode and back into the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def input_device(model: Any) -> torch.device:
    """Return where token ids go: to the embedding; from the CPU they are brought to one that waits outside the device."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device
