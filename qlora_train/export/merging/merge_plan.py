"""Which tensors a merge writes, decided from names and shapes alone, before a byte is written.

Tied embeddings are the subtle part. A tied model stores one matrix for embedding and head. Trained token rows change
both, as they did in training; a change to only one of them (modules_to_save, LoRA on the head) unties them, and both
are written.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qlora_train.export.merging.adapter_deltas import (
    AdapterFile,
    ExpertLowRank,
    LowRank,
    Replace,
    TokenRows,
    Update,
    listed,
)
from qlora_train.export.merging.base_checkpoint import BaseCheckpoint
from qlora_train.export.merging.meta_model import MetaModel
from qlora_train.export.merging.tensor_layout import NameMapping, TensorGroup, refuse_irreversible
from qlora_train.utils.errors import MergeError


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write: its name in the file, its final shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedGroup:
    """Tensors that are read, changed and written together.

    Attributes:
        unit: names on both sides.
        updates: what the adapter does to its parameters, by name.
        is_made: some parameter is changed or rounded; what is not is copied.
        outputs: the tensors to write, in the order of `group.outputs`.
    """

    group: TensorGroup
    updates: dict[str, Update]
    is_made: bool
    outputs: tuple[OutputTensor, ...]


@dataclass(frozen=True)
class MergePlan:
    """All units in order, and what a model folder is told of them.

    Attributes:
        units: what is read and written.
        tied: whether the head stays the embedding.
        num_embeddings: rows of the embedding.
        missing: parameters of the model that nothing in the base makes.
    """

    groups: tuple[PlannedGroup, ...]
    tied: bool
    num_embeddings: int
    missing: list[str]

    @property
    def outputs(self) -> list[OutputTensor]:
        """All tensors to write in order."""
        return [tensor for planned in self.groups for tensor in planned.outputs]

    @property
    def unmapped(self) -> list[str]:
        """Names of the tensors that belong to no parameter of the model."""
        return [name for planned in self.groups if not planned.group.parameters for name in planned.group.sources]


def plan_merge(
    base: BaseCheckpoint,
    adapter: AdapterFile,
    meta_model: MetaModel,
    names: NameMapping,
    groups: tuple[TensorGroup, ...],
    rounded: frozenset[str],
    dtype: torch.dtype | None,
) -> MergePlan:
    """Match every change of the adapter with what makes its parameter.

    Args:
        names: the rules for names in the base.
        units: what the base consists of.
        rounded: the parameters that go through 4 bits first.
        dtype: of the floating-point parameters to write; None keeps the base's own.

    Raises:
        MergeError: a change without its tensor, shapes that disagree, token rows that nobody trained.
    """
    embedding, head = f"{meta_model.embedding}.weight", f"{meta_model.head}.weight"
    holders = {parameter: group for group in groups for parameter in group.parameters}
    if embedding not in holders:
        raise MergeError(
            f"{base.folder}: no tensor {embedding}; its files do not hold the model that config.json describes"
        )
    tied = meta_model.tied and (head not in holders or _equal(base, holders, embedding, head))
    if tied and head in holders:
        groups = tuple(group for group in groups if group is not holders[head])
    if tied and _unties(adapter, embedding, head):
        stored = holders[embedding].sources
        name = names.name_in_file(head, embedding, stored[0])
        groups, tied = (*groups, TensorGroup(stored, (head,), None, (name,))), False
    _refuse_unmatched(base, adapter, {parameter for group in groups for parameter in group.parameters})
    shapes = {
        parameter: _changed_shape(base, adapter, parameter, meta_model.shapes[parameter], group, (embedding, head))
        for group in groups
        for parameter in group.parameters
    }
    _refuse_unequal_vocabularies(shapes, embedding, head)
    in_float32 = meta_model.kept_in_float32(dtype) if dtype else frozenset()
    planned = [_planned(base, adapter, group, shapes, rounded, in_float32, dtype) for group in groups]
    for made in (item for item in planned if item.is_made):
        refuse_irreversible(made.group, names, {name: base.shape(name) for name in made.group.sources})
    return MergePlan(tuple(planned), tied, shapes[embedding][0], sorted(meta_model.untied - holders.keys()))


def _equal(base: BaseCheckpoint, holders: Mapping[str, TensorGroup], one: str, other: str) -> bool:
    first, second = (holders[name].load(base.read)[name] for name in (one, other))
    return torch.equal(first, second)


def _planned(
    base: BaseCheckpoint,
    adapter: AdapterFile,
    group: TensorGroup,
    shapes: Mapping[str, tuple[int, ...]],
    rounded: frozenset[str],
    in_float32: frozenset[str],
    dtype: torch.dtype | None,
) -> PlannedGroup:
    updates = {name: adapter.updates[name] for name in group.parameters if name in adapter.updates}
    written = torch.float32 if in_float32.intersection(group.parameters) else dtype
    outputs = []
    for source, name in zip(group.sources, group.outputs, strict=True):
        stored = base.dtype(source)
        shape = base.shape(source) if group.conversion or not group.parameters else shapes[group.parameters[0]]
        keeps = not group.parameters or not stored.is_floating_point
        outputs.append(OutputTensor(name, shape, stored if keeps or written is None else written))
    return PlannedGroup(group, updates, bool(updates) or not rounded.isdisjoint(group.parameters), tuple(outputs))


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


def _refuse_unmatched(base: BaseCheckpoint, adapter: AdapterFile, names: set[str]) -> None:
    unmatched = sorted(set(adapter.updates) - names)
    if unmatched:
        raise MergeError(
            f"{adapter.path}: {len(unmatched)} changes find no tensor of the same name in {base.folder}: "
            f"{listed(unmatched)}; the base's names are like {listed(sorted(names), 3)}; merge onto the base that the "
            "adapter was trained on"
        )


def _changed_shape(
    base: BaseCheckpoint,
    adapter: AdapterFile,
    name: str,
    of_model: tuple[int, ...],
    group: TensorGroup,
    vocabulary: tuple[str, str],
) -> tuple[int, ...]:
    """Return a parameter's shape with the adapter's change."""
    update = adapter.updates.get(name)
    shape = base.shape(group.sources[0]) if group.conversion is None else of_model
    if update is None:
        return shape
    if isinstance(update, TokenRows):
        return _shape_with_rows(adapter, update, name, shape)
    changed = _shape_in_adapter(adapter, update)
    grows = isinstance(update, Replace) and name in vocabulary and changed[1:] == shape[1:] and changed[0] > shape[0]
    if changed != shape and not grows:
        raise MergeError(
            f"{adapter.path}: {name} is {changed} in the adapter and {shape} in {base.folder}; merge onto the base "
            "that the adapter was trained on"
        )
    return changed


def _shape_in_adapter(adapter: AdapterFile, update: LowRank | ExpertLowRank | Replace) -> tuple[int, ...]:
    if isinstance(update, Replace):
        return adapter.shape(update.key)
    matrix = (adapter.shape(update.b)[0], adapter.shape(update.a)[1])
    stored = matrix[::-1] if update.transposed else matrix
    return (update.num_experts, *stored) if isinstance(update, ExpertLowRank) else stored


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


def _refuse_unequal_vocabularies(shapes: dict[str, tuple[int, ...]], embedding: str, head: str) -> None:
    bias = head.removesuffix(".weight") + ".bias"
    for name in (head, bias):
        if name in shapes and shapes[name][0] != shapes[embedding][0]:
            raise MergeError(
                f"{name} has {shapes[name][0]} rows and {embedding} {shapes[embedding][0]}: the adapter was trained "
                "with new tokens on only one of them; train the new rows in both, or add modules_to_save: [lm_head]"
            )
