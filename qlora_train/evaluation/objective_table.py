"""The objectives: for each, the loss that is trained and the metrics of held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qlora_train.data.types import Example
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.objectives.batch_loss import LossFunction
from qlora_train.objectives.sft_loss import SftLoss


class Evaluate(Protocol):
    """Measures a model on held-out rows."""

    def __call__(
        self, model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int
    ) -> dict[str, float]:
        """Return metrics by name; `loss` is the objective's own."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a run trains.

    Attributes:
        loss: of a micro-batch.
        evaluate: metrics of held-out rows.
    """

    loss: LossFunction
    evaluate: Evaluate


def _evaluate_sft(model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int) -> dict[str, float]:
    return {"loss": held_out_loss(model, examples, batch_size=batch_size, pad_token_id=pad_token_id).loss}


SFT = Objective(SftLoss(), _evaluate_sft)
