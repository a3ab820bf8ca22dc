"""The objectives: for each, the loss that is trained and the metrics of held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from qlora_train.config.objectives import OBJECTIVES
from qlora_train.config.schema import LoraSection, TrainSection
from qlora_train.data.types import Example
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.objectives.batch_loss import LossFunction
from qlora_train.objectives.sft_loss import SftLoss

if TYPE_CHECKING:
    from qlora_train.objectives.reference_logps import Reference


class Evaluate(Protocol):
    """Measures a model on held-out rows."""

    def __call__(
        self, model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int
    ) -> dict[str, float]:
        """Return metrics by name; `loss` is the objective's own."""


class RowLosses(Protocol):
    """Measures the objective's loss of single rows."""

    def __call__(self, model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int) -> list[float]:
        """Return the loss of each row."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a run trains.

    Attributes:
        loss: of a micro-batch.
        evaluate: metrics of held-out rows.
        row_losses: loss of each row.
        reference: makes a model the reference model; None: the objective has none.
    """

    loss: LossFunction
    evaluate: Evaluate
    row_losses: RowLosses
    reference: "Reference | None" = None


def _evaluate_sft(model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int) -> dict[str, float]:
    return {"loss": held_out_loss(model, examples, batch_size=batch_size, pad_token_id=pad_token_id).loss}


def _row_losses_sft(model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int) -> list[float]:
    losses = held_out_loss(model, examples, batch_size=batch_size, pad_token_id=pad_token_id, task="row losses")
    return [each.nll / max(each.num_tokens, 1) for each in losses.per_example]


SFT = Objective(SftLoss(), _evaluate_sft, _row_losses_sft)


def make_objective(train: TrainSection, lora: LoraSection, model: Any) -> Objective:
    """Return the objective of a run, before its adapter is trained."""
    row = OBJECTIVES[train.objective]
    if row.dataset_type == "language_modeling":
        return SFT
    from qlora_train.evaluation.held_out_preferences import evaluate_preferences, preference_losses
    from qlora_train.objectives.preference_loss import PreferenceLoss

    chosen = {name: getattr(train, name) for name in row.defaults}
    settings = {name: default if chosen[name] is None else chosen[name] for name, default in row.defaults.items()}
    reference = _make_reference(lora, model) if row.uses_reference else None
    loss = PreferenceLoss(row.name, reference=reference, **settings)
    return Objective(loss, partial(evaluate_preferences, loss), partial(preference_losses, loss), reference)


def _make_reference(lora: LoraSection, model: Any) -> "Reference":
    from qlora_train.adapters.reference_model import InitialAdapter, base_model

    is_base = lora.adapter_path is None and lora.bias == "none"  # PEFT leaves trained biases on
    return base_model if is_base else InitialAdapter(model)
