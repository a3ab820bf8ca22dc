"""Which tensors a merge writes, decided from names and shapes alone, before a byte is written.

Tied embeddings are the subtle part. A tied model stores one matrix for embedding and head. Trained token rows change
both, as they did in training; a change to only one of them (modules_to_save, LoRA on the head) unties them, and both
are written.
"""

from dataclasses import dataclass, replace

import torch

from qlora_train.errors import MergeError
from qlora_train.export.adapter_file import AdapterFile, LowRank, Replace, TokenRows, Update, listed
from qlora_train.export.base_file import BaseFile, Skeleton


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write: where it comes from, what the adapter does to it, its final shape."""

    name: str
    source: str
    update: Update | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class MergePlan:
    """All tensors to write in order, whether the head stays tied, and the rows of the embedding."""

    tensors: tuple[OutputTensor, ...]
    tied: bool
    num_embeddings: int


def plan_merge(base: BaseFile, adapter: AdapterFile, skeleton: Skeleton) -> MergePlan:
    """Match every change of the adapter with a tensor of the base.

    Raises:
        MergeError: a change without its tensor, shapes that disagree, token rows that nobody trained.
    """
    embedding, head = f"{skeleton.embedding}.weight", f"{skeleton.head}.weight"
    sources = {name: name for name in base.names}
    tied = skeleton.tied
    if tied and head in sources:
        tied = embedding in sources and torch.equal(base.read(embedding), base.read(head))
        if tied:
            del sources[head]
    if tied and _unties(adapter, embedding, head):
        sources[head], tied = embedding, False
    _refuse_unmatched(base, adapter, set(sources))
    tensors = [_output(base, adapter, name, source, (embedding, head)) for name, source in sources.items()]
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    _refuse_unequal_vocabularies(base, shapes, embedding, head)
    return MergePlan(tuple(tensors), tied, shapes[embedding][0])


def merged_tensor(adapter: AdapterFile, update: Update | None, weight: torch.Tensor) -> torch.Tensor:
    """Return the base's float32 weight with the adapter's change, in float32.

    LoRA: W + scale * B A (https://arxiv.org/abs/2106.09685). DoRA: each row i of that is scaled to the learnt length
    m_i (https://arxiv.org/abs/2402.09353); the length divided by is that of this very base.
    """
    if update is None:
        return weight
    if isinstance(update, Replace):
        return adapter.read(update.key)
    if isinstance(update, TokenRows):
        rows, indices = adapter.read(update.key), torch.tensor(update.indices)
        grown = weight.new_zeros((max(weight.shape[0], max(update.indices) + 1), *weight.shape[1:]))
        grown[: weight.shape[0]] = weight
        return grown.index_copy_(0, indices, rows)
    weight = weight + (adapter.read(update.b) @ adapter.read(update.a)) * update.scale
    if update.magnitude is None:
        return weight
    length = torch.linalg.norm(weight, dim=1)
    return (adapter.read(update.magnitude) / length).unsqueeze(1) * weight


def _unties(adapter: AdapterFile, embedding: str, head: str) -> bool:
    """Say whether the adapter makes embedding and head of a tied model differ; drop a head equal to its embedding."""
    of_embedding, of_head = adapter.updates.get(embedding), adapter.updates.get(head)
    if (
        isinstance(of_embedding, Replace)
        and isinstance(of_head, Replace)
        and adapter.same(of_embedding.key, of_head.key)
    ):
        adapter.read(of_head.key)
        del adapter.updates[head]
        return False
    return of_head is not None or not isinstance(of_embedding, TokenRows | None)


def _refuse_unmatched(base: BaseFile, adapter: AdapterFile, names: set[str]) -> None:
    unmatched = sorted(set(adapter.updates) - names)
    if unmatched:
        raise MergeError(
            f"{adapter.path}: {len(unmatched)} changes find no tensor of the same name in {base.folder}: "
            f"{listed(unmatched)}; the base's names are like {listed(sorted(names), 3)}; merge onto the base that the "
            "adapter was trained on"
        )


def _output(base: BaseFile, adapter: AdapterFile, name: str, source: str, vocabulary: tuple[str, str]) -> OutputTensor:
    update, shape = adapter.updates.get(name), base.shape(source)
    output = OutputTensor(name, source, update, shape)
    if update is None:
        return output
    changed: tuple[int, ...]
    if isinstance(update, LowRank):
        changed = (adapter.shape(update.b)[0], adapter.shape(update.a)[1])
    elif isinstance(update, Replace):
        changed = adapter.shape(update.key)
        if name in vocabulary and changed[1:] == shape[1:] and changed[0] > shape[0]:
            return replace(output, shape=changed)
    else:
        return replace(output, shape=_shape_with_rows(adapter, update, name, shape))
    if changed != shape:
        raise MergeError(
            f"{adapter.path}: {name} is {changed} in the adapter and {shape} in {base.folder}; merge onto the base "
            "that the adapter was trained on"
        )
    return output


def _shape_with_rows(adapter: AdapterFile, update: TokenRows, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    expected = (len(update.indices), shape[1])
    if adapter.shape(update.key) != expected or len(set(update.indices)) != len(update.indices):
        raise MergeError(
            f"{adapter.path}: {update.key} is {adapter.shape(update.key)} where trainable_token_indices and {name} ask "
            f"for {expected} with no index twice; the two files are not of one adapter"
        )
    num_rows = max(shape[0], max(update.indices) + 1)
    untrained = sorted(set(range(shape[0], num_rows)) - set(update.indices))
    if untrained:
        raise MergeError(
            f"{adapter.path}: {name} grows from {shape[0]} to {num_rows} rows, but rows {untrained[:8]} were not "
            "trained and have no value; train every new token"
        )
    return (num_rows, *shape[1:])


def _refuse_unequal_vocabularies(base: BaseFile, shapes: dict[str, tuple[int, ...]], embedding: str, head: str) -> None:
    if embedding not in shapes:
        raise MergeError(
            f"{base.folder}: no tensor {embedding}; its files do not hold the model that config.json describes"
        )
    bias = head.removesuffix(".weight") + ".bias"
    for name in (head, bias):
        if name in shapes and shapes[name][0] != shapes[embedding][0]:
            raise MergeError(
                f"{name} has {shapes[name][0]} rows and {embedding} {shapes[embedding][0]}: the adapter was trained "
                "with new tokens on only one of them; train the new rows in both, or add modules_to_save: [lm_head]"
            )
