"""The objectives: for each, the loss that is trained and the metrics of held-out rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from qlora_train.config.objectives import OBJECTIVES
from qlora_train.config.schema import LoraSection, TrainSection
from qlora_train.data.types import Example
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.objectives.batch_loss import Batch, LossFunction
from qlora_train.objectives.sft_loss import SftLoss

if TYPE_CHECKING:
    from qlora_train.objectives.reference_logps import Reference


class Evaluate(Protocol):
    """Measures a model on held-out rows."""

    def __call__(
        self, model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int
    ) -> dict[str, float]:
        """Return metrics by name; `loss` is the objective's own."""


class KlSum(Protocol):
    """Estimates a KL divergence for the loss of a step."""

    def __call__(self, model: Any, batch: Batch, *, chunk_tokens: int | None) -> Tensor:
        """Return the summed log-probability ratios of a batch of mismatched sequences, a scalar."""


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
        kl_sum: of an objective whose loss reads the KL divergence of the whole step.
        derived: metrics that follow from the means of others.
    """

    loss: LossFunction
    evaluate: Evaluate
    row_losses: RowLosses
    reference: "Reference | None" = None
    kl_sum: KlSum | None = None
    derived: Callable[[Mapping[str, float]], dict[str, float]] = lambda _means: {}


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
    settings = row.settings(train)
    reference = _make_reference(lora, model) if row.uses_reference else None
    if row.dataset_type == "unpaired_preference":
        from qlora_train.evaluation.held_out_unpaired import evaluate_unpaired, unpaired_losses
        from qlora_train.objectives.kto_loss import KtoLoss, margins

        assert reference is not None
        kto = KtoLoss(estimates_kl=row.estimates_kl, reference=reference, **settings)
        kl_sum = kto.kl_sum if row.estimates_kl else None
        return Objective(
            kto, partial(evaluate_unpaired, kto), partial(unpaired_losses, kto), reference, kl_sum, margins
        )
    from qlora_train.evaluation.held_out_preferences import evaluate_preferences, preference_losses
    from qlora_train.objectives.preference_loss import PreferenceLoss

    loss = PreferenceLoss(row.name, reference=reference, **settings)
    return Objective(loss, partial(evaluate_preferences, loss), partial(preference_losses, loss), reference)


def _make_reference(lora: LoraSection, model: Any) -> "Reference":
    from qlora_train.adapters.reference_model import InitialAdapter, base_model

    is_base = lora.adapter_path is None and lora.bias == "none"  # PEFT leaves trained biases on
    return base_model if is_base else InitialAdapter(model)
