"""Held-out loss: total negative log-likelihood over total label tokens, in nats/token."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from qlora_train.data.collate import PaddingCollator
from qlora_train.data.types import Example
from qlora_train.evaluation.batched_inference import (
    batches_by_length,
    compute_share_in_batches,
    input_device,
    raise_if_stopped,
    row_too_long,
)
from qlora_train.kernels.fsdp_units import is_sharded
from qlora_train.objectives.chunk_sizes import EVAL_LOGITS_BYTES
from qlora_train.objectives.label_losses import label_logits, label_losses
from qlora_train.parallel import context
from qlora_train.utils.device import catch_out_of_memory
from qlora_train.utils.errors import DataError
from qlora_train.utils.eval_mode import eval_mode

MAX_LOGITS = 1 << 28
"""Maximum logits per batch of several rows; 1 GiB if a model returns them in float32."""
ONE_ROW_ADVICE = "lower data.max_length, or free memory that others use"


@dataclass(frozen=True)
class ExampleLoss:
    """Total negative log-likelihood of an example's labels, in nats, and their number."""

    nll: float
    num_tokens: int


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss over examples; `per_example` keeps their order."""

    nll: float
    num_tokens: int
    per_example: tuple[ExampleLoss, ...]

    @property
    def loss(self) -> float:
        """Nats per label token."""
        return self.nll / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite on overflow."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @classmethod
    def of(cls, per_example: Sequence[ExampleLoss]) -> Self:
        return cls(math.fsum(e.nll for e in per_example), sum(e.num_tokens for e in per_example), tuple(per_example))


@torch.no_grad()
def held_out_loss(
    model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int, task: str = "evaluation"
) -> HeldOutLoss:
    """Return the loss of a causal language model on examples; its training mode is restored.

    As in training, a label at position 0 does not count. A batch has fewer than `batch_size` rows if the logits of its
    labels would exceed MAX_LOGITS, or if memory runs out. The ranks of a run compute different batches, the same ones as
    one process would.

    Args:
        task: name of the work, for its progress.

    Raises:
        DataError: no example has a label.
        ModelError: a single row does not fit into memory.
        Stop: a signal asked the process to stop.
    """
    sizes = [(len(example.input_ids), int(np.count_nonzero(example.loss_mask[1:]))) for example in examples]
    lengths, num_labels = [length for length, _ in sizes], [count for _, count in sizes]
    if not any(num_labels):
        raise DataError(f"held-out loss: {len(examples)} rows and none with a label token; data.eval needs answers")
    nll = torch.zeros(len(examples), dtype=torch.float64)
    collate = PaddingCollator(pad_token_id)
    device = input_device(model)
    max_labels = MAX_LOGITS // model.config.get_text_config().vocab_size

    def losses_of(batch: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        raise_if_stopped(model)
        tensors = collate([(index, examples[index]) for index in batch])
        inputs: dict[str, Any] = {name: tensors[name].to(device) for name in ("input_ids", "attention_mask")}
        losses = label_losses(model, **inputs, labels=tensors["labels"])
        return tensors["row"][losses.row_index], losses.nll.double().cpu()

    def compute(batch: Sequence[int]) -> None:
        rows, losses = losses_of(batch)
        nll.index_add_(0, rows, losses)

    with eval_mode(model):
        compute_share_in_batches(
            batches_by_length(lengths, batch_size, num_labels, max_labels), compute, lengths,
            setting="train.per_device_eval_batch_size", advice=ONE_ROW_ADVICE,
            join=losses_of if is_sharded(model) else None, task=task,
        )  # fmt: skip
    context().sum_(nll)
    return HeldOutLoss.of([ExampleLoss(*row) for row in zip(nll.tolist(), num_labels, strict=True)])


@torch.no_grad()
def label_log_probabilities(model: Any, examples: Sequence[Example]) -> Iterator[torch.Tensor]:
    """Yield a causal language model's log-probabilities at the labels of examples, in order.

    Yields:
        Chunks of float32 (labels, vocabulary).

    Raises:
        ModelError: a single row does not fit into memory.
        Stop: a signal asked the process to stop.
    """
    collate, device = PaddingCollator(0), input_device(model)
    with eval_mode(model):
        for example in examples:
            raise_if_stopped(model)
            tensors = collate([(0, example)])
            input_ids = tensors["input_ids"].to(device)
            logits, reason = catch_out_of_memory(
                partial(label_logits, model, input_ids=input_ids, labels=tensors["labels"])
            )
            if logits is None:
                raise row_too_long(len(example.input_ids), reason, ONE_ROW_ADVICE)
            for chunk in logits.split(max(1, EVAL_LOGITS_BYTES // (4 * logits.shape[-1]))):
                yield torch.log_softmax(chunk.float(), dim=-1)
