"""What a model predicts at a bounded number of label tokens, kept small enough for a file, and how far another is from it.

Of each token the likeliest continuations are kept with their log-probabilities, and the probability of all others
together. The Kullback-Leibler divergence over these is a lower bound of that over the whole vocabulary (the data processing
inequality), and equal to it but for what happens within the tail. 2,048 tokens with 256 continuations each are 4 MB,
where all logits of a vocabulary of 150,000 would be 600 MB in 16 bits.
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
from qlora_train.models.token_probes import TokenProbe, load_probes, save_probes

NUM_COMPARED = 2048
"""Label tokens at which predictions are compared."""
NUM_LIKELIEST = 256
"""Continuations of each that are kept."""
_LEAST_PROBABILITY = 1e-12
"""Below it the probability of all other tokens is rounding."""


@dataclass(frozen=True)
class Predictions:
    """The likeliest continuations at each label: `tokens` int32 and `log_probabilities` float32, both (num_labels, k)."""

    tokens: torch.Tensor
    log_probabilities: torch.Tensor

    @classmethod
    def of(cls, model: Any, rows: Sequence[Example]) -> Self:
        """Return what a model predicts at the labels of `compared_rows`."""
        pieces = label_log_probabilities(model, rows)
        kept = [piece.topk(min(NUM_LIKELIEST, piece.shape[-1])) for piece in pieces]
        tokens, values = [some.indices.int().cpu() for some in kept], [some.values.cpu() for some in kept]
        return cls(torch.cat(tokens), torch.cat(values))


@dataclass(frozen=True)
class Divergence:
    """How near a model is to another.

    Attributes:
        kl: Kullback-Leibler divergence in nats per token, a lower bound.
        top1_agreement: share of labels with the same most likely token.
        num_tokens: labels that were compared.
        max_difference: the largest one of log-probabilities that were kept.
    """

    kl: float
    top1_agreement: float
    num_tokens: int
    max_difference: float


def measure_divergence(model: Any, rows: Sequence[Example], wanted: Predictions) -> Divergence:
    """Compare a model with predictions on the same rows; what is not a number in it is not a number in the result."""
    divergence, num_same, at, differences = 0.0, 0, 0, [0.0]
    for found in label_log_probabilities(model, rows):
        part = slice(at, at + len(found))
        tokens, expected = wanted.tokens[part].long(), wanted.log_probabilities[part].double()
        actual = found.cpu().gather(-1, tokens).double()
        divergence += float(_divergences(expected, actual).sum())
        differences.append(float((actual - expected).abs().max()))
        num_same += int((found.argmax(-1).cpu() == tokens[:, 0]).sum())
        at += len(found)
    assert at == len(wanted.tokens), "the predictions belong to other rows"
    return Divergence(divergence / at, num_same / at, at, max(differences))


def _divergences(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return the divergence of each row of log-probabilities (some, k), all other tokens taken as one."""
    rest, found_rest = (
        (1 - values.exp().sum(-1)).clamp(min=_LEAST_PROBABILITY) for values in (expected, found)
    )  # fmt: skip
    return (expected.exp() * (expected - found)).sum(-1) + rest * (rest.log() - found_rest.log())


def compared_rows(rows: Iterable[Example], num_labels: int = NUM_COMPARED) -> list[Example]:
    """Return the first rows until they have `num_labels` labels, the last one cut, and none that has no label."""
    chosen: list[Example] = []
    left = num_labels
    for row in rows:
        if left == 0:
            break
        mask = np.array(row.loss_mask, dtype=np.bool_)
        mask[0] = False  # nothing predicts it
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
    """What the adapter on its base does, for what is saved of it to be held to.

    Attributes:
        rows: on which the loss is measured; predictions are compared on their `compared_rows`.
        held_out: whether they were held out, or trained on where no row was.
        losses: on the rows.
        predictions: at the labels of the compared rows.
        probes: texts with the tokens that the run makes of them.
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
        chosen = [at for at, row in enumerate(self.losses.per_example) if row.num_tokens][:num_rows]
        rows = [self.rows[at] for at in chosen]
        num_labels = sum(int(np.count_nonzero(row.loss_mask)) for row in compared_rows(rows))
        predictions = Predictions(self.predictions.tokens[:num_labels], self.predictions.log_probabilities[:num_labels])
        losses = HeldOutLoss.of([self.losses.per_example[at] for at in chosen])
        return replace(self, rows=rows, losses=losses, predictions=predictions)

    def save(self, file: Path) -> None:
        """Write what another process needs: tokens and labels of the rows, the predictions, and beside it the probes."""
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
    """Return the rows, predictions and probes that `Reference.save` wrote."""
    tensors = load_file(file)
    lengths = tensors["lengths"].tolist()
    ids, masks = (tensors[name].split(lengths) for name in ("ids", "labels"))
    rows = [
        Example(f"row {number}", row.numpy(), mask.numpy())
        for number, (row, mask) in enumerate(zip(ids, masks, strict=True))
    ]
    predictions = Predictions(tensors["tokens"], tensors["log_probabilities"])
    return rows, predictions, load_probes(file.with_suffix(".json"))
