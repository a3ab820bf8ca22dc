"""Loss, rewards and KL divergence of unpaired preferences: of each row, and as means over held-out rows.

The KL divergence is that of all rows that are measured, each prompt with the answer of the row before it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qlora_train.data.collate import Batch
from qlora_train.data.mismatched_rows import mismatched_sequence, other_rows
from qlora_train.data.types import Example
from qlora_train.evaluation.batched_inference import input_device
from qlora_train.evaluation.row_batches import compute_row_batches
from qlora_train.objectives.batch_loss import model_inputs
from qlora_train.objectives.kto_loss import KL, KtoLoss, margins
from qlora_train.objectives.label_losses import label_losses
from qlora_train.objectives.reference_logps import reference_logps, sequence_logps
from qlora_train.parallel import context

Values = dict[str, float]


def evaluate_unpaired(
    loss: KtoLoss, model: Any, rows: Sequence[Example], *, batch_size: int, pad_token_id: int
) -> dict[str, float]:
    """Return the means of `loss`, rewards and log-probabilities of either kind, and the KL divergence."""
    values, kl = _measured(loss, model, rows, batch_size, pad_token_id, "evaluation")
    means = {"loss": _mean([each["loss"] for each in values]), **({KL: kl} if loss.estimates_kl else {})}
    for kind, is_desirable in (("chosen", True), ("rejected", False)):
        of_kind = [each for each, row in zip(values, rows, strict=True) if row.desirable is is_desirable]
        for name, value in (("rewards", "reward"), ("logps", "logps")) if of_kind else ():
            means[f"{name}/{kind}"] = _mean([each[value] for each in of_kind])
    return means | margins(means)


def unpaired_losses(
    loss: KtoLoss, model: Any, rows: Sequence[Example], *, batch_size: int, pad_token_id: int
) -> list[float]:
    """Return the loss of each row."""
    values, _ = _measured(loss, model, rows, batch_size, pad_token_id, "row losses")
    return [each["loss"] for each in values]


@torch.no_grad()
def _measured(
    loss: KtoLoss, model: Any, rows: Sequence[Example], batch_size: int, pad_token_id: int, task: str
) -> tuple[list[Values], float]:
    """Return the values of each row, in order, and the KL divergence; the model's training mode is restored.

    Raises:
        ModelError: a single row does not fit into memory.
        Stop: a signal asked the process to stop.
    """

    def in_batches(examples: Sequence[Example], values_of: Callable[[Batch, Any, Any], list[Values]]) -> list[Values]:
        return _values_in_batches(loss, model, examples, batch_size, pad_token_id, task, values_of)

    def ratios_of(batch: Batch, policy: Any, reference: Any) -> list[Values]:
        return [{"ratio": each} for each in (sequence_logps(policy, batch) - reference).tolist()]

    def row_values(batch: Batch, policy: Any, reference: Any) -> list[Values]:
        found = {name: value.tolist() for name, value in loss.row_values(batch, policy, reference, kl).items()}
        return [{name: value[index] for name, value in found.items()} for index in range(len(batch["row"]))]

    kl: torch.Tensor | None = None
    if loss.estimates_kl:
        length = max(len(row.input_ids) for row in rows)
        pairs = other_rows(range(len(rows)), ())
        others = [mismatched_sequence(rows[index], rows[other], length) for index, other in pairs]
        labelled = [each.with_label(desirable=True) for each in others]
        mean = _mean([each["ratio"] for each in in_batches(labelled, ratios_of)])
        kl = torch.tensor(max(mean, 0.0), device=input_device(model))
    return in_batches(rows, row_values), 0.0 if kl is None else float(kl)


def _values_in_batches(
    loss: KtoLoss, model: Any, rows: Sequence[Example], batch_size: int, pad_token_id: int, task: str,
    values_of: Callable[[Batch, Any, Any], list[Values]],
) -> list[Values]:  # fmt: skip
    values: dict[int, Values] = {}

    def compute(batch: Batch) -> list[Values]:
        inputs: dict[str, Any] = model_inputs(batch)
        reference = reference_logps(model, batch, loss.reference)
        return values_of(batch, label_losses(model, **inputs).nll, reference)

    compute_row_batches(
        model, rows, compute, lambda batch, found: values.update(zip(batch["row"].tolist(), found, strict=True)),
        batch_size=batch_size, pad_token_id=pad_token_id, task=task,
    )  # fmt: skip
    of_rows = {row: value for of_rank in context().gather(values) for row, value in of_rank.items()}
    return [of_rows[row] for row in range(len(rows))]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
