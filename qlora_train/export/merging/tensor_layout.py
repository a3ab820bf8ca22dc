"""Map the tensors of a checkpoint to the parameters of the model, and back.

Transformers renames tensors on loading (prefixes, older names) and converts them: the matrices of a hundred experts, one
tensor each in the file, become one parameter of three dimensions. An adapter uses the model's names; a merged folder must
use the file's, or other programs cannot read it.

The rules are Transformers' own. Its rules for saving cannot know every file, so the way back is tried first: it must give
the names and shapes that the file has, or the merge is refused before it begins.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qlora_train.utils.errors import MergeError, first_line

Read = Callable[[str], torch.Tensor]
_CONVERSION_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Raised by operations of Transformers on unsuitable tensors."""


@dataclass(frozen=True)
class Source:
    """A tensor that a converter takes: the converter's pattern, and the tensor's name after renaming."""

    name: str
    pattern: str
    renamed: str


@dataclass(frozen=True)
class Conversion:
    """A use of a Transformers converter: `sources` in its order; `first` is the parameter it starts at."""

    model: Any
    converter: Any
    first: str
    sources: tuple[Source, ...]

    def forward(self, tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert the file's tensors to parameters by name; each tensor is released once it is used."""
        converter = deepcopy(self.converter)
        for source, tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.first, source.name, source.pattern, tensor)
        return self._run(converter, self.first)

    def backward(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert parameters to the file's tensors by name."""
        converter = self.converter.reverse_transform()
        for name, tensor in parameters.items():
            start, pattern = converter.rename_source_key(name)
            converter.add_tensor(start, name, pattern, tensor)
        in_file = {source.renamed: source.name for source in self.sources}
        return {in_file[name]: tensor for name, tensor in self._run(converter, start).items()}

    def _run(self, converter: Any, start: str) -> dict[str, torch.Tensor]:
        converted = converter.convert(start, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of the file that are read, changed and written together.

    Attributes:
        sources: names of the tensors to read.
        parameters: names of the parameters made of them; empty for unmapped tensors.
        conversion: None if one tensor is one parameter.
        outputs: names of the tensors to write.
    """

    sources: tuple[str, ...]
    parameters: tuple[str, ...]
    conversion: Conversion | None
    outputs: tuple[str, ...]

    def load(self, read: Read) -> dict[str, torch.Tensor]:
        """Return the parameters by name.

        Raises:
            MergeError: converting back does not give the sources bit for bit.
        """
        if self.conversion is None:
            return {self.parameters[0]: read(self.sources[0])}
        parameters = self.conversion.forward(read(source.name) for source in self.conversion.sources)
        for name, tensor in self.conversion.backward(parameters).items():
            if not torch.equal(tensor, read(name)):
                raise MergeError(
                    f"{name}: Transformers' conversion to {self.parameters[0]} is not reversible exactly; use the adapter "
                    "unmerged"
                )
        return parameters

    def store(self, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors to write by name."""
        if self.conversion is None:
            return {self.outputs[0]: parameters[self.parameters[0]]}
        return self.conversion.backward(parameters)


class NameMapping:
    """Transformers' rules for the tensor names of one model's checkpoints."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters: dict[str, torch.Tensor] = dict(model.state_dict())
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def target(self, name: str) -> tuple[str, str | None]:
        """Return the parameter that a tensor goes into, and the pattern of the converter that does it."""
        prefix, known = self.model.base_model_prefix, self.parameters
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, known)
        if target not in known and name in known:  # renamed by a rule for another file's names
            target, pattern = rename_source_key(name, [], [], prefix, known)
        return target, pattern

    def source(self, name: str, pattern: str, target: str) -> Source:
        """Return a tensor of a converter with its name after renaming, with the prefix of its parameter."""
        renamed, _ = rename_source_key(name, self._renamings, [])
        converted, _ = rename_source_key(name, self._renamings, self._converters)
        return Source(name, pattern, target.removesuffix(converted) + str(renamed))

    def conversion(self, first: str, sources: list[Source]) -> Conversion:
        """Return the use of the converter that takes these tensors."""
        by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        return Conversion(self.model, by_pattern[sources[0].pattern], first, tuple(sources))

    def name_in_file(self, parameter: str, neighbour: str, neighbour_in_file: str) -> str:
        """Return the name of a parameter that is new in the file.

        The model's own, unless the file follows rules for older names and one of them is for this parameter; that rule
        must leave the name of a neighbour in the file unchanged.
        """
        used = [rule for rule in self._renamings if rule.was_used()]
        others = [rule for rule in self._renamings if rule not in used and not isinstance(rule, PrefixChange)]
        for added in (None, *others) if used else ():
            rules = [rule for rule in self._renamings if rule in used or rule is added]
            back = [rule.reverse_transform() for rule in reversed(rules)]
            name, in_file = (str(rename_source_key(name, back, [])[0]) for name in (parameter, neighbour))
            if name != parameter and in_file == neighbour_in_file and self.target(name) == (parameter, None):
                return name
        return parameter


def group_tensors(names: NameMapping, shapes: Mapping[str, tuple[int, ...]]) -> tuple[TensorGroup, ...]:
    """Group the tensors of a checkpoint, in the order of `shapes`.

    Raises:
        MergeError: two tensors make one parameter, or tensors do not make the expected parameters.
    """
    groups: list[TensorGroup] = []
    holders: dict[str, str] = {}
    converted: dict[str, list[Source]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = names.target(name)
        if target not in names.parameters:
            groups.append(TensorGroup((name,), (), None, (name,)))
        elif pattern is not None:
            converted.setdefault(target, []).append(names.source(name, pattern, target))
        else:
            _set_holder(holders, target, name)
            groups.append(TensorGroup((name,), (target,), None, (name,)))
    order = {name: index for index, name in enumerate(shapes)}
    for first, sources in converted.items():
        conversion = names.conversion(first, sources)
        parameters = _try_forward(conversion, names.parameters, shapes)
        in_file = tuple(sorted((source.name for source in sources), key=order.__getitem__))
        for parameter in parameters:
            _set_holder(holders, parameter, in_file[0])
        groups.append(TensorGroup(in_file, parameters, conversion, in_file))
    return tuple(sorted(groups, key=lambda group: order[group.sources[0]]))


def check_reversible(group: TensorGroup, names: NameMapping, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Try on shapes alone that a group's parameters can be written back.

    Raises:
        MergeError: they cannot.
    """
    if group.conversion is None:
        return
    reason = ""
    try:
        back = group.conversion.backward({name: torch.empty_like(names.parameters[name]) for name in group.parameters})
        for name in group.sources:
            actual = tuple(back[name].shape) if name in back else "missing"
            if actual != shapes[name]:
                reason = f"{name} is {shapes[name]} and would be {actual}"
                break
    except _CONVERSION_ERRORS as error:
        reason = repr(error)
    if reason:
        raise MergeError(
            f"{group.sources[0]}: Transformers converts it to {group.parameters[0]}, which cannot be written back: "
            f"{reason}; use the adapter unmerged"
        )


def _try_forward(
    conversion: Conversion, parameters: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Try a conversion on shapes alone and return the names of its parameters."""
    sources = [source.name for source in conversion.sources]
    try:
        converted = conversion.forward(torch.empty(shapes[name], device="meta") for name in sources)
    except _CONVERSION_ERRORS as error:
        raise MergeError(
            f"{sources[0]}: Transformers cannot convert it to {conversion.first}: {first_line(error)}; the files do not "
            "hold the model that config.json describes"
        ) from error
    for name, tensor in converted.items():
        expected = tuple(parameters[name].shape) if name in parameters else "no such parameter"
        if tuple(tensor.shape) != expected:
            raise MergeError(
                f"{name}: {len(sources)} tensors like {sources[0]} give shape {tuple(tensor.shape)}, config.json "
                f"{expected}; the base is incomplete, or does not belong to this config"
            )
    return tuple(converted)


def _set_holder(holders: dict[str, str], parameter: str, name: str) -> None:
    if (holder := holders.setdefault(parameter, name)) != name:
        raise MergeError(f"{holder} and {name} both hold {parameter} of the model; remove one of them from the base")
