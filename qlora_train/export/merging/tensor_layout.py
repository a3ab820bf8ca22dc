"""Which tensors of a checkpoint make which parameters of the model, and how to go both ways.

A file's names are often not the model's. Transformers renames on loading (prefixes, older names) and converts: the
matrices of a hundred experts, a tensor each in the file, become one parameter of three dimensions. An adapter speaks the
model's names, and a merged folder must speak the file's, or nothing but Transformers would read it.

The rules are Transformers' own, asked for every name. Going back is not left to its rules for saving alone, which cannot
know every file: what comes back must have the names and shapes of the tensors that went in, or the merge is refused
before it begins.
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
"""What operations of Transformers raise on tensors that they were not made for."""


@dataclass(frozen=True)
class Source:
    """A tensor of the file: the pattern of the converter that takes it, and its name between renaming and converting."""

    name: str
    pattern: str
    renamed: str


@dataclass(frozen=True)
class Conversion:
    """One use of a converter of Transformers: `sources` in the order it takes them, `first` the parameter it starts at."""

    model: Any
    converter: Any
    first: str
    sources: tuple[Source, ...]

    def forward(self, tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the parameters by name; the tensors are let go as they are used."""
        converter = deepcopy(self.converter)
        for source, tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.first, source.name, source.pattern, tensor)
        return self._run(converter, self.first)

    def backward(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the file's tensors by their names there."""
        converter = self.converter.reverse_transform()
        for name, tensor in parameters.items():
            start, pattern = converter.rename_source_key(name)
            converter.add_tensor(start, name, pattern, tensor)
        in_file = {source.renamed: source.name for source in self.sources}
        return {in_file[name]: tensor for name, tensor in self._run(converter, start).items()}

    def _run(self, converter: Any, start: str) -> dict[str, torch.Tensor]:
        made = converter.convert(start, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of the file that are read, changed and written together.

    Attributes:
        sources: names of the tensors to read.
        parameters: names of what they make; empty when no parameter of the model is made of them.
        conversion: how they make it; None when one tensor is one parameter.
        outputs: names of the tensors to write.
    """

    sources: tuple[str, ...]
    parameters: tuple[str, ...]
    conversion: Conversion | None
    outputs: tuple[str, ...]

    def load(self, read: Read) -> dict[str, torch.Tensor]:
        """Return the parameters that the sources make.

        Raises:
            MergeError: converting back does not give the sources bit for bit.
        """
        if self.conversion is None:
            return {self.parameters[0]: read(self.sources[0])}
        order = [source.name for source in self.conversion.sources]
        parameters = self.conversion.forward(read(name) for name in order)
        for name, tensor in self.conversion.backward(parameters).items():
            if not torch.equal(tensor, read(name)):
                raise MergeError(
                    f"{name}: Transformers' conversion to {self.parameters[0]} loses some of it, so that it cannot be "
                    "written back exactly; use the adapter unmerged"
                )
        return parameters

    def store(self, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors to write by name."""
        if self.conversion is None:
            return {self.outputs[0]: parameters[self.parameters[0]]}
        return self.conversion.backward(parameters)


class NameMapping:
    """Transformers' rules for the names of one model's checkpoints."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters: dict[str, torch.Tensor] = dict(model.state_dict())
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def target(self, name: str) -> tuple[str, str | None]:
        """Return the parameter that a tensor goes into, and the pattern of the converter that takes it there."""
        prefix, known = self.model.base_model_prefix, self.parameters
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, known)
        if target not in known and name in known:  # renamed by a rule that is meant for another file's names
            target, pattern = rename_source_key(name, [], [], prefix, known)
        return target, pattern

    def source(self, name: str, pattern: str, target: str) -> Source:
        """Return a tensor with its name after renaming, with the prefix that its parameter has got."""
        renamed, _ = rename_source_key(name, self._renamings, [])
        converted, _ = rename_source_key(name, self._renamings, self._converters)
        return Source(name, pattern, target.removesuffix(converted) + str(renamed))

    def conversion(self, first: str, sources: list[Source]) -> Conversion:
        """Return the use of the converter that takes these tensors."""
        by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        return Conversion(self.model, by_pattern[sources[0].pattern], first, tuple(sources))

    def name_in_file(self, parameter: str, neighbour: str, neighbour_in_file: str) -> str:
        """Return the name for a parameter that the file does not hold yet.

        It is the model's own, unless the file follows rules for older names and one of them is for this parameter.

        Args:
            neighbour: a parameter that it holds, which must keep its name.
            neighbour_in_file: that one's name.
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
    """Return what a checkpoint consists of, in the order of its names.

    Args:
        names: rules of the model that it is of.
        shapes: of its tensors, by name.

    Raises:
        MergeError: two tensors make one parameter, or tensors do not make the parameters that they are meant for.
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
        elif (holder := holders.setdefault(target, name)) == name:
            groups.append(TensorGroup((name,), (target,), None, (name,)))
        else:
            raise _held_twice(holder, name, target)
    order = {name: position for position, name in enumerate(shapes)}
    for first, sources in converted.items():
        conversion = names.conversion(first, sources)
        parameters = _made(conversion, names.parameters, shapes)
        in_file = tuple(sorted((source.name for source in sources), key=order.__getitem__))
        for parameter in parameters:
            if (holder := holders.setdefault(parameter, in_file[0])) != in_file[0]:
                raise _held_twice(holder, in_file[0], parameter)
        groups.append(TensorGroup(in_file, parameters, conversion, in_file))
    return tuple(sorted(groups, key=lambda group: order[group.sources[0]]))


def refuse_irreversible(group: TensorGroup, names: NameMapping, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Try on shapes alone that what a unit makes can be written back.

    Raises:
        MergeError: it cannot.
    """
    if group.conversion is None:
        return
    try:
        back = group.conversion.backward({name: torch.empty_like(names.parameters[name]) for name in group.parameters})
    except _CONVERSION_ERRORS as error:
        raise _irreversible(group, repr(error)) from error
    for name in group.sources:
        found = tuple(back[name].shape) if name in back else "missing"
        if found != shapes[name]:
            raise _irreversible(group, f"{name} is {shapes[name]} and would be {found}")


def _made(
    conversion: Conversion, parameters: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Return the names of the parameters that a conversion makes, tried on shapes alone."""
    sources = [source.name for source in conversion.sources]
    try:
        made = conversion.forward(torch.empty(shapes[name], device="meta") for name in sources)
    except _CONVERSION_ERRORS as error:
        raise MergeError(
            f"{sources[0]}: Transformers cannot convert it to {conversion.first}: {first_line(error)}; the files do not "
            "hold the model that config.json describes"
        ) from error
    for name, tensor in made.items():
        expected = tuple(parameters[name].shape) if name in parameters else "no such parameter"
        if tuple(tensor.shape) != expected:
            raise MergeError(
                f"{name}: {len(sources)} tensors like {sources[0]} make {tuple(tensor.shape)} where config.json asks for "
                f"{expected}; the base is not whole, or not of this config"
            )
    return tuple(made)


def _held_twice(one: str, other: str, parameter: str) -> MergeError:
    return MergeError(f"{one} and {other} both hold {parameter} of the model; remove one of them from the base")


def _irreversible(group: TensorGroup, reason: str) -> MergeError:
    return MergeError(
        f"{group.sources[0]}: what Transformers makes of it, {group.parameters[0]}, cannot be written back: {reason}; use "
        "the adapter unmerged"
    )
