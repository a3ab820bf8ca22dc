"""Plan which tensors a merge writes, from names and shapes alone, before anything is written.

Tied embeddings: a tied model stores one matrix for embedding and head. Trained token rows change both, as in training; a
change to only one of them (modules_to_save, LoRA on the head) unties them, and both are written.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qlora_train.export.merging.adapter_deltas import AdapterFile, ExpertLowRank, Replace, TokenRows, Update
from qlora_train.export.merging.base_checkpoint import BaseCheckpoint
from qlora_train.export.merging.meta_model import MetaModel
from qlora_train.export.merging.tensor_layout import NameMapping, TensorGroup, check_reversible
from qlora_train.utils.errors import MergeError, listed

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedGroup:
    """Tensors that are read, changed and written together.

    Attributes:
        group: names on both sides.
        updates: of its parameters, by name.
        is_changed: some parameter is updated or quantized; other groups are copied.
        outputs: the tensors to write, in the order of `group.outputs`.
    """

    group: TensorGroup
    updates: dict[str, Update]
    is_changed: bool
    outputs: tuple[OutputTensor, ...]


@dataclass(frozen=True)
class MergePlan:
    """All groups in order.

    Attributes:
        groups: in the order of the base's tensors.
        tied: whether embedding and head stay one matrix.
        num_embeddings: rows of the embedding.
        missing: parameters of the model that the base does not have.
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
        """Tensors that belong to no parameter of the model."""
        return [name for planned in self.groups if not planned.group.parameters for name in planned.group.sources]


def plan_merge(
    base: BaseCheckpoint,
    adapter: AdapterFile,
    meta_model: MetaModel,
    names: NameMapping,
    groups: tuple[TensorGroup, ...],
    quantized: frozenset[str],
    dtype: torch.dtype | None,
) -> MergePlan:
    """Match every update of the adapter with the group of its parameter.

    Args:
        quantized: parameters that are quantized to 4 bits and back.
        dtype: of the floating-point parameters to write; None for the base's own.

    Raises:
        MergeError: an update without its tensor, shapes that disagree, or untrained token rows.
    """
    embedding, head = f"{meta_model.embedding}.weight", f"{meta_model.head}.weight"
    holders = {parameter: group for group in groups for parameter in group.parameters}
    if embedding not in holders:
        raise MergeError(
            f"{base.folder}: no tensor {embedding}; the files do not hold the model that config.json describes"
        )
    tied = meta_model.tied and (head not in holders or _is_equal(base, holders, embedding, head))
    if tied and head in holders:
        groups = tuple(group for group in groups if group is not holders[head])
    # token rows are trained in both; any other update is of one of them
    if tied and (head in adapter.updates or not isinstance(adapter.updates.get(embedding), TokenRows | None)):
        stored = holders[embedding].sources
        name = names.name_in_file(head, embedding, stored[0])
        groups, tied = (*groups, TensorGroup(stored, (head,), None, (name,))), False
    _check_matched(base, adapter, {parameter for group in groups for parameter in group.parameters})
    shapes = {
        parameter: _merged_shape(
            base, adapter, parameter,
            meta_model.shapes[parameter] if group.conversion else base.shape(group.sources[0]),
            can_grow=parameter in (embedding, head),
        )
        for group in groups
        for parameter in group.parameters
    }  # fmt: skip
    _check_vocabulary_sizes(shapes, embedding, head)
    in_float32 = meta_model.float32_parameters(dtype) if dtype else frozenset()
    planned = [_plan_group(base, adapter, group, shapes, quantized, in_float32, dtype) for group in groups]
    for changed in (each.group for each in planned if each.is_changed):
        check_reversible(changed, names, {name: base.shape(name) for name in changed.sources})
    return MergePlan(tuple(planned), tied, shapes[embedding][0], sorted(meta_model.untied - holders.keys()))


def _is_equal(base: BaseCheckpoint, holders: Mapping[str, TensorGroup], one: str, other: str) -> bool:
    first, second = (holders[name].load(base.read)[name] for name in (one, other))
    return torch.equal(first, second)


def _plan_group(
    base: BaseCheckpoint,
    adapter: AdapterFile,
    group: TensorGroup,
    shapes: Mapping[str, Shape],
    quantized: frozenset[str],
    in_float32: frozenset[str],
    dtype: torch.dtype | None,
) -> PlannedGroup:
    updates = {name: adapter.updates[name] for name in group.parameters if name in adapter.updates}
    written = torch.float32 if in_float32.intersection(group.parameters) else dtype
    outputs = []
    for source, name in zip(group.sources, group.outputs, strict=True):
        stored = base.dtype(source)
        shape = base.shape(source) if group.conversion or not group.parameters else shapes[group.parameters[0]]
        is_copied = not group.parameters or not stored.is_floating_point
        outputs.append(OutputTensor(name, shape, stored if is_copied or written is None else written))
    return PlannedGroup(group, updates, bool(updates) or not quantized.isdisjoint(group.parameters), tuple(outputs))


def _check_matched(base: BaseCheckpoint, adapter: AdapterFile, names: set[str]) -> None:
    unmatched = sorted(set(adapter.updates) - names)
    if unmatched:
        raise MergeError(
            f"{adapter.path}: {len(unmatched)} changes have no tensor of the same name in {base.folder}: "
            f"{listed(unmatched)}; the base's names are like {listed(sorted(names), 3)}; merge onto the base that the "
            "adapter was trained on"
        )


def _merged_shape(base: BaseCheckpoint, adapter: AdapterFile, name: str, shape: Shape, *, can_grow: bool) -> Shape:
    update = adapter.updates.get(name)
    if update is None:
        return shape
    if isinstance(update, TokenRows):
        return _shape_with_rows(adapter, update, name, shape)
    if isinstance(update, Replace):
        changed = adapter.shape(update.key)
    else:
        matrix = (adapter.shape(update.b)[0], adapter.shape(update.a)[1])
        changed = matrix[::-1] if update.transposed else matrix
        if isinstance(update, ExpertLowRank):
            changed = (update.num_experts, *changed)
    grows = can_grow and isinstance(update, Replace) and changed[1:] == shape[1:] and changed[0] > shape[0]
    if changed != shape and not grows:
        raise MergeError(
            f"{adapter.path}: {name} is {changed} in the adapter and {shape} in {base.folder}; merge onto the base "
            "that the adapter was trained on"
        )
    return changed


def _shape_with_rows(adapter: AdapterFile, update: TokenRows, name: str, shape: Shape) -> Shape:
    expected = (len(update.indices), shape[1])
    if adapter.shape(update.key) != expected or len(set(update.indices)) != len(update.indices):
        raise MergeError(
            f"{adapter.path}: {update.key} is {adapter.shape(update.key)}, but trainable_token_indices and {name} need "
            f"{expected} and unique indices; the two files do not belong together"
        )
    num_rows = max(shape[0], max(update.indices) + 1)
    untrained = sorted(set(range(shape[0], num_rows)) - set(update.indices))
    if untrained:
        raise MergeError(
            f"{adapter.path}: {name} grows from {shape[0]} to {num_rows} rows, but rows {untrained[:8]} were not trained; "
            "train every new token"
        )
    return (num_rows, *shape[1:])


def _check_vocabulary_sizes(shapes: dict[str, Shape], embedding: str, head: str) -> None:
    for name in (head, head.removesuffix(".weight") + ".bias"):
        if name in shapes and shapes[name][0] != shapes[embedding][0]:
            raise MergeError(
                f"{name} has {shapes[name][0]} rows and {embedding} {shapes[embedding][0]}: the adapter was trained "
                "with new tokens in only one of them; train the new rows in both, or add modules_to_save: [lm_head]"
            )
