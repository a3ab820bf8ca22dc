"""What a rank reads of a checkpoint that it loads in part, and quantizes.

A weight that is stored as one tensor is read in rows. Of experts that are stored one by one, those are read of which this
rank has a part; the others are NaN. Weights that Transformers splits or transposes while loading, and pre-quantized ones,
are read whole, one at a time.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from qlora_train.kernels.expert_weights import ExpertWeights
from qlora_train.kernels.sharded_weights import as_blocks, has_whole_blocks, set_blocks
from qlora_train.models.checkpoint_tensors import DTYPES, Dequantized
from qlora_train.models.hf_quantizer import SHARDED_LOAD
from qlora_train.models.malloc_trim import MemoryTrimmer
from qlora_train.models.shard_quantize import own_weights, quantize_part, rows_of_blocks
from qlora_train.models.shard_rows import own_rows

NOTHING = range(0)


@dataclass
class ShardedLoad:
    """A load in parts.

    Attributes:
        whole_vocabulary: load embedding and head whole, because they will grow.
        stored: names of the stored tensors.
        sliced: shapes of the 16-bit parameters that are loaded in part, by name.
        rows: to read of a stored tensor, by its name; empty: this rank has no part of it.
    """

    whole_vocabulary: bool = False
    stored: tuple[str, ...] = ()
    sliced: dict[str, torch.Size] = field(default_factory=dict)
    rows: dict[str, range] = field(default_factory=dict)
    _padding: dict[Any, int | None] = field(default_factory=dict)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the load in progress."""
        token = SHARDED_LOAD.set(self)
        try:
            yield
        finally:
            SHARDED_LOAD.reset(token)
            for module, padding_idx in self._padding.items():
                module.padding_idx = padding_idx

    def lazy(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return lazy tensors that read the rows known by the time they are read."""
        self.stored = tuple(tensors)
        return {name: _Rows(name, tensor, self.rows) for name, tensor in tensors.items()}

    def choose(self, model: Any, quantizer: Any, expert_names: Container[str]) -> None:
        """Choose the rows of each stored tensor.

        Args:
            model: on the meta device, with 4-bit layers in place.
            quantizer: may add conversions of its own.
            expert_names: parameters that are stacks of experts in 4 bits.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        vocabulary = set() if self.whole_vocabulary else {model.get_input_embeddings(), model.get_output_embeddings()}
        num_merged: Counter[tuple[str, str | None]] = Counter()
        for name, target, pattern, converter in _targets(model, quantizer, self.stored):
            if target not in parameters:
                continue
            shape, module = parameters[target].shape, model.get_submodule(target.rpartition(".")[0])
            in_4bit = target in expert_names or _is_quantized(module, target)
            if converter is None and module in vocabulary and len(shape) == 2:
                self.sliced[target], self.rows[name] = shape, own_rows(shape[0])
                if isinstance(module, nn.Embedding):
                    # some models zero the padding row after loading, which here is another token's
                    self._padding[module], module.padding_idx = module.padding_idx, None
            elif converter is None and in_4bit and is_cut(shape):
                self.rows[name] = rows_of_blocks(shape)
            elif converter is not None and in_4bit and is_cut(shape) and _merges_rows(converter):
                if num_merged[target, pattern] not in rows_of_blocks(shape):
                    self.rows[name] = NOTHING
                num_merged[target, pattern] += 1

    def convert(
        self, name: str, value: Tensor, model: Any, quantizer: Any, memory: MemoryTrimmer
    ) -> nn.Parameter | None:
        """Return this rank's part of a parameter, quantized if it is to be; None if it is loaded whole.

        Args:
            name: of the parameter.
            value: the rows that were read.
            model: with the parameter's module.
            quantizer: with the settings; receives the scales of experts.
            memory: counts temporaries.
        """
        module = model.get_submodule(name.rpartition(".")[0])
        if name in self.sliced:
            return nn.Parameter(self.part(value, self.sliced[name]).clone(), requires_grad=False)
        is_stack = name in quantizer.expert_names
        if not is_stack and issubclass(module.source_cls, Conv1D):
            value = value.T
        shape = model.get_parameter(name).shape if is_stack else torch.Size((module.out_features, module.in_features))
        if not is_cut(shape):
            return None
        config = quantizer.quantization_config
        quantized = quantize_part(
            self.weights(value, shape),
            shape if is_stack else torch.Size((1, *shape)),
            quant_type=config.bnb_4bit_quant_type,
            double_quant=config.bnb_4bit_use_double_quant,
            count=memory.count,
        )
        if not is_stack:
            set_blocks(module, quantized.codes, quantized.absmax, quantized.states[0])
            module._is_hf_initialized = module.absmax._is_hf_initialized = True
            return module.weight
        quantizer.experts[name] = weights = ExpertWeights(quantized.states)
        weights.set_absmax_blocks(as_blocks(quantized.absmax))
        return as_blocks(quantized.codes)

    def part(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return this rank's rows of a tensor, from all rows or from those."""
        own = own_rows(shape[0])
        return rows[own.start : own.stop] if len(rows) == shape[0] else rows

    def weights(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return the weights of this rank's blocks, flat, from all rows of a tensor or from those that hold them."""
        first = 0 if len(rows) == shape[0] else rows_of_blocks(shape).start
        return own_weights(rows, first, shape)


@dataclass(frozen=True)
class _Rows:
    """A lazy tensor that reads the chosen rows of another."""

    name: str
    stored: Any
    rows: Mapping[str, range]

    def __getitem__(self, whole: EllipsisType) -> Tensor:
        rows = self.rows.get(self.name)
        if rows == NOTHING and rows is not None:
            dtype = DTYPES[self.stored.get_dtype()]
            return torch.full((), torch.nan, dtype=dtype).expand(self.stored.get_shape())
        if rows is None or isinstance(self.stored, Dequantized):
            tensor: Tensor = self.stored[whole]
            return tensor
        part: Tensor = self.stored[rows.start : rows.stop]
        return part

    def get_shape(self) -> list[int]:
        shape: list[int] = self.stored.get_shape()
        return shape

    def get_dtype(self) -> str:
        dtype: str = self.stored.get_dtype()
        return dtype


def is_cut(shape: torch.Size) -> bool:
    """Return whether ranks quantize parts of a weight, (out, in) or (experts, a, b): its matrices are whole blocks."""
    return has_whole_blocks(shape[-2:])


def _is_quantized(module: nn.Module, target: str) -> bool:
    """Return whether a parameter is a 4-bit linear weight that is quantized as it is stored."""
    return isinstance(module, Linear4bit) and target.endswith(".weight") and not issubclass(module.source_cls, Conv1D)


def _merges_rows(converter: WeightConverter) -> bool:
    """Return whether each stored tensor becomes a row of the parameter: experts that are stored one by one."""
    first, *more = converter.operations
    return (
        isinstance(first, MergeModulelist)
        and first.dim == 0
        and all(
            (isinstance(operation, Concatenate) and operation.dim != 0)
            or (isinstance(operation, Transpose) and 0 not in (operation.dim0, operation.dim1))
            for operation in more
        )
    )


def _targets(
    model: Any, quantizer: Any, stored: Iterable[str]
) -> Iterator[tuple[str, str, str | None, WeightConverter | None]]:
    """Yield each stored tensor's name, its parameter's, and the pattern and converter that apply, in loading order."""
    mapping = get_model_conversion_mapping(model, None, quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known = model.state_dict()
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        yield name, target, pattern, by_pattern[pattern] if pattern is not None else None
