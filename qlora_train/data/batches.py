"""Examples -> batches: the data set the Trainer walks, the collator, and the order of an epoch as a pure function."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from qlora_train.data.types import Example
from qlora_train.loss import IGNORED

MEGABATCH_BATCHES = 50
"""Batches whose rows are sorted together by `group_by_length`: wide enough to match lengths, narrow enough to mix."""


def to_dataset(examples: Sequence[Example]) -> datasets.Dataset:
    """Return a data set with the columns `input_ids`, `labels` (IGNORED where the mask is false) and `row`.

    `row` is the index into `examples`, so that the trainer can name the rows of a batch.
    """
    labels = [
        [token if learnt else IGNORED for token, learnt in zip(example.input_ids, example.loss_mask, strict=True)]
        for example in examples
    ]
    return datasets.Dataset.from_dict(
        {
            "input_ids": [list(example.input_ids) for example in examples],
            "labels": labels,
            "row": list(range(len(examples))),
        },
        features=datasets.Features(
            input_ids=datasets.List(datasets.Value("int32")),
            labels=datasets.List(datasets.Value("int32")),
            row=datasets.Value("int64"),
        ),
    )


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads rows on the right to one length, a multiple of `multiple_of` tokens (see `padding_multiple`).

    Returns int64 tensors: `input_ids`, `attention_mask` (1 for a token, 0 for padding) and `labels` of shape
    (batch, seq), and `row` of shape (batch,). Labels come from the mask, never from token ids: a pad token that is also
    the eos token still carries loss where it ends an answer.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad `features`, rows of `to_dataset`, into one batch."""
        longest = max(len(feature["input_ids"]) for feature in features)
        length = -(-longest // self.multiple_of) * self.multiple_of
        ones = [[1] * len(feature["input_ids"]) for feature in features]
        return {
            "input_ids": _padded([feature["input_ids"] for feature in features], self.pad_token_id, length),
            "attention_mask": _padded(ones, 0, length),
            "labels": _padded([feature["labels"] for feature in features], IGNORED, length),
            "row": torch.tensor([int(feature["row"]) for feature in features], dtype=torch.long),
        }


def padding_multiple(device: torch.device) -> int:
    """Return the number of tokens whose multiples batches are padded to on a device.

    Tensor cores work on tiles of 8 16-bit numbers: a length that 8 does not divide sends whole matrix products to slower
    kernels (NVIDIA, Matrix Multiplication Background User's Guide, "Requirements to Use Tensor Cores"). Without tensor
    cores every padded token is work for nothing.
    """
    return 8 if device.type == "cuda" else 1


def _padded(rows: Sequence[Sequence[int]], filler: int, length: int) -> torch.Tensor:
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows], dtype=torch.long)


def epoch_order(lengths: Sequence[int], *, seed: int, epoch: int, batch_size: int, group_by_length: bool) -> list[int]:
    """Return the order of the rows in one epoch: a permutation that depends on nothing but the arguments.

    With `group_by_length`, shuffled rows are cut into megabatches of MEGABATCH_BATCHES batches and sorted by length
    within each; then the whole batches are shuffled. A last batch that is not full stays last, so that every batch that
    a loader cuts from the order holds rows of similar length.

    Args:
        lengths: tokens of each row.
        seed: `run.seed`.
        epoch: from 0; every epoch has an order of its own.
        batch_size: rows of the batches that the loader will cut.
        group_by_length: batch rows of similar length.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    shuffled: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    if not group_by_length:
        return shuffled
    width = batch_size * MEGABATCH_BATCHES
    batches: list[list[int]] = []
    for begin in range(0, len(shuffled), width):
        megabatch = sorted(shuffled[begin : begin + width], key=lambda row: lengths[row], reverse=True)
        batches += [megabatch[i : i + batch_size] for i in range(0, len(megabatch), batch_size)]
    num_full = len(lengths) // batch_size
    order: list[int] = torch.randperm(num_full, generator=generator).tolist()
    return [row for i in [*order, *range(num_full, len(batches))] for row in batches[i]]


def labelled_batches(
    examples: Sequence[Example], order: Sequence[int], collate: Collator, *, min_labels: int, max_batches: int
) -> list[dict[str, torch.Tensor]]:
    """Return batches of as many rows, in this order, as it takes to hold `min_labels` labels each.

    Rows at the end that do not fill a batch are left out, unless there would be no batch at all.
    """
    batches: list[list[int]] = [[]]
    for row in order:
        if len(batches) > max_batches:
            break
        batches[-1].append(row)
        if sum(sum(examples[i].loss_mask) for i in batches[-1]) >= min_labels:
            batches.append([])
    chosen = batches[:-1] or batches
    dataset = to_dataset([examples[row] for rows in chosen for row in rows])
    features = iter(dataset)
    return [collate([next(features) for _ in rows]) for rows in chosen]
