"""Compute rows in batches of similar length, smaller ones where memory runs out."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from qlora_train.kernels.fsdp_units import is_sharded
from qlora_train.parallel import context
from qlora_train.parallel.shared_stop import shared_stop
from qlora_train.utils import signals
from qlora_train.utils.cpu_memory import return_freed_memory
from qlora_train.utils.device import catch_out_of_memory
from qlora_train.utils.errors import ModelError
from qlora_train.utils.run_events import tracked

logger = logging.getLogger(__name__)


def batches_by_length(
    lengths: Sequence[int], batch_size: int, num_labels: Sequence[int] = (), max_labels: int = 0
) -> Iterator[list[int]]:
    """Yield row indices in batches of similar length, longest first: a batch too large for memory fails at once.

    Args:
        lengths: tokens per row.
        batch_size: maximum rows per batch.
        num_labels: labels per row; if given, a batch of several rows has at most `max_labels` in total.
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
    retries: bool = True,
    task: str = "evaluation",
) -> None:
    """Call `compute` with every batch; out of memory, halve the rows and keep to that number of tokens.

    Args:
        batches: row indices from `batches_by_length`.
        compute: takes row indices; a failed call must leave no result.
        lengths: final tokens per row, generated ones included.
        setting: name of the batch size setting, for messages.
        advice: what to do about a single row that does not fit.
        retries: False: do not halve, raise.
        task: name of the work, for its progress.

    Raises:
        ModelError: a single row does not fit into memory, or a batch without `retries`.
    """
    max_tokens = math.inf
    all_batches = list(batches)
    for batch in tracked(all_batches, task, sum(map(len, all_batches)), "rows", len):
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
            if not retries:
                raise ModelError(
                    f"out of memory: {len(rows)} x {length} tokens do not fit ({reason}); lower {setting} "
                    "(parallel.strategy: fsdp cannot retry)"
                )
            max_tokens = len(rows) // 2 * length
            logger.warning(
                "memory: %d x %d tokens do not fit, retries with %d rows (%s; lower %s)",
                len(rows), length, len(rows) // 2, reason, setting,
            )  # fmt: skip


def compute_share_in_batches(
    batches: Iterable[list[int]],
    compute: Callable[[list[int]], None],
    lengths: Sequence[int],
    *,
    setting: str,
    advice: str,
    join: Callable[[list[int]], Any] | None = None,
    task: str = "evaluation",
) -> None:
    """Call `compute` with this rank's share of the batches, which all ranks together compute as one process would.

    Args:
        join: computes a batch without a result; a rank with one batch less than others calls it, because a sharded base is
            gathered by all ranks together. None: ranks are independent.
        task: name of the work, for its progress.

    Raises:
        ModelError: as `compute_in_batches`, on every rank that of the first rank without memory; with `join`, on that rank
            alone and for any batch that does not fit.
        Stop: a signal asked the process of any rank to stop.
    """
    return_freed_memory()  # of training steps: what a batch allocates has other sizes
    every_batch = list(batches)
    share = every_batch[context().rank :: context().world_size]
    stopped, failure = None, None
    try:
        # a rank that repeats a batch would gather other weights than the rest
        compute_in_batches(share, compute, lengths, setting=setting, advice=advice, retries=join is None, task=task)
        if join is not None and len(share) < len(every_batch[:: context().world_size]):
            join(every_batch[-1])
    except signals.Stop as stop:
        stopped = stop  # every rank comes to the next lines, whichever was asked to stop
    except ModelError as error:
        if join is not None:
            raise
        failure = str(error)
    if failure := next(filter(None, context().gather(failure)), None):
        raise ModelError(failure)
    if shared_stop():
        signals.raise_if_requested()
    if stopped is not None:
        raise stopped


def raise_if_stopped(model: Any) -> None:
    """Raise the stop that was requested; with a sharded base on all ranks at once, which compute together.

    Raises:
        Stop: a signal asked the process to stop, or that of another rank.
    """
    if is_sharded(model):
        shared_stop()
    signals.raise_if_requested()


def row_too_long(num_tokens: int, reason: str | None, advice: str) -> ModelError:
    """Return the error for a single row that does not fit into memory."""
    return ModelError(f"out of memory: one row of {num_tokens} tokens does not fit ({reason}); {advice}")


def input_device(model: Any) -> torch.device:
    """Return the device of the embedding; an offloaded embedding is on meta and takes token ids from the CPU."""
    # not `weight`, which PEFT computes from the base's, maybe sharded, and new tokens
    device: torch.device = next(model.get_input_embeddings().parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
