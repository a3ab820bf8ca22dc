"""A model's top predictions at a bounded number of label tokens, and the KL divergence of another model from them.

For each label token the most likely tokens are stored with their log-probabilities; the rest of the vocabulary counts as
one token. By the data processing inequality the KL divergence of these is a lower bound of that over the whole vocabulary.
2,048 tokens with 256 candidates each take 4 MB; all logits of a vocabulary of 150,000 would take 600 MB in 16 bits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qlora_train.data.types import Example
from qlora_train.evaluation.held_out_loss import HeldOutLoss, label_log_probabilities
from qlora_train.export.check_sizes import TOP_K
from qlora_train.models.token_probes import TokenProbe, load_probes, save_probes

NUM_COMPARED = 2048
"""Label tokens at which predictions are compared."""
_MIN_PROBABILITY = 1e-12
"""Below it the probability of the rest of the vocabulary is rounding."""


@dataclass(frozen=True)
class Predictions:
    """The most likely tokens at each label: `tokens` int32 and `log_probabilities` float32, both (num_labels, k)."""

    tokens: torch.Tensor
    log_probabilities: torch.Tensor

    @classmethod
    def of(cls, model: Any, rows: Sequence[Example]) -> Self:
        """Compute a model's predictions at the labels of `compared_rows`."""
        top = [chunk.topk(min(TOP_K, chunk.shape[-1])) for chunk in label_log_probabilities(model, rows)]
        return cls(
            torch.cat([each.indices.int().cpu() for each in top]), torch.cat([each.values.cpu() for each in top])
        )


@dataclass(frozen=True)
class Divergence:
    """Difference between two models' predictions."""

    kl: float
    """Kullback-Leibler divergence in nats per token, a lower bound."""
    top1_agreement: float
    """Share of labels with the same most likely token."""
    num_tokens: int
    max_difference: float
    """Of the stored log-probabilities."""


def measure_divergence(model: Any, rows: Sequence[Example], expected: Predictions) -> Divergence:
    """Compare a model with predictions on the same rows; NaN predictions give a NaN divergence."""
    kl, num_same, start, differences = 0.0, 0, 0, [0.0]
    for chunk in label_log_probabilities(model, rows):
        part = slice(start, start + len(chunk))
        tokens, expected_values = expected.tokens[part].long(), expected.log_probabilities[part].double()
        actual_values = chunk.cpu().gather(-1, tokens).double()
        kl += float(_kl_by_label(expected_values, actual_values).sum())
        differences.append(float((actual_values - expected_values).abs().max()))
        num_same += int((chunk.argmax(-1).cpu() == tokens[:, 0]).sum())
        start += len(chunk)
    assert start == len(expected.tokens), "the predictions belong to other rows"
    return Divergence(kl / start, num_same / start, start, max(differences))


def _kl_by_label(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Return the divergence of each row of log-probabilities (num_labels, k), the rest of the vocabulary as one token."""
    rest, actual_rest = ((1 - values.exp().sum(-1)).clamp(min=_MIN_PROBABILITY) for values in (expected, actual))
    return (expected.exp() * (expected - actual)).sum(-1) + rest * (rest.log() - actual_rest.log())


def compared_rows(rows: Iterable[Example], num_labels: int = NUM_COMPARED) -> list[Example]:
    """Return the first rows with labels, up to `num_labels` labels in total; the last row is cut."""
    chosen: list[Example] = []
    left = num_labels
    for row in rows:
        if left == 0:
            break
        mask = np.array(row.loss_mask, dtype=np.bool_)
        mask[0] = False  # no token predicts it
        mask &= np.cumsum(mask) <= left
        if not mask.any():
            continue
        end = int(mask.nonzero()[0][-1]) + 1
        ids = np.array(row.input_ids, dtype=np.int32)
        chosen.append(replace(row, input_ids=ids[:end], loss_mask=mask[:end]))
        left -= int(mask.sum())
    return chosen


@dataclass(frozen=True)
class Reference:
    """Measurements of the adapter on its base, which a saved model is compared with.

    Attributes:
        rows: of the loss; predictions are compared on their `compared_rows`.
        held_out: False for training rows.
        losses: on the rows.
        predictions: at the labels of the compared rows.
        probes: texts with their tokens in the run.
    """

    rows: Sequence[Example]
    held_out: bool
    losses: HeldOutLoss
    predictions: Predictions
    probes: Sequence[TokenProbe] = ()

    @property
    def loss(self) -> float:
        """Nats per label token."""
        return self.losses.loss

    def first(self, num_rows: int) -> "Reference":
        """Return the reference on the first rows that have a label."""
        chosen = [index for index, row in enumerate(self.losses.per_example) if row.num_tokens][:num_rows]
        rows = [self.rows[index] for index in chosen]
        num_labels = sum(int(np.count_nonzero(row.loss_mask)) for row in compared_rows(rows))
        predictions = Predictions(self.predictions.tokens[:num_labels], self.predictions.log_probabilities[:num_labels])
        losses = HeldOutLoss.of([self.losses.per_example[index] for index in chosen])
        return replace(self, rows=rows, losses=losses, predictions=predictions)

    def save(self, file: Path) -> None:
        """Write token ids and labels of the rows, the predictions, and a JSON file of the probes beside `file`."""
        ids = [np.asarray(row.input_ids, dtype=np.int32) for row in self.rows]
        masks = [np.asarray(row.loss_mask, dtype=np.bool_) for row in self.rows]
        tensors = {
            "ids": torch.from_numpy(np.concatenate(ids)),
            "labels": torch.from_numpy(np.concatenate(masks)),
            "lengths": torch.tensor([len(row) for row in ids]),
            "tokens": self.predictions.tokens,
            "log_probabilities": self.predictions.log_probabilities,
        }
        save_file(tensors, file)
        save_probes(file.with_suffix(".json"), self.probes)


def load_reference(file: Path) -> tuple[list[Example], Predictions, list[TokenProbe]]:
    """Read rows, predictions and probes that `Reference.save` wrote."""
    tensors = load_file(file)
    lengths = tensors["lengths"].tolist()
    ids, masks = (tensors[name].split(lengths) for name in ("ids", "labels"))
    rows = [
        Example(f"row {number}", row.numpy(), mask.numpy())
        for number, (row, mask) in enumerate(zip(ids, masks, strict=True))
    ]
    predictions = Predictions(tensors["tokens"], tensors["log_probabilities"])
    return rows, predictions, load_probes(file.with_suffix(".json"))
