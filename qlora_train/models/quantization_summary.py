"""Quantization summary: the share of weights in 4 bits, and the bytes of the model by dtype.

A weight matrix that silently stays in 16 bits is the most common failure of 4-bit loading, so every load is checked.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from qlora_train.kernels.expert_weights import quantized_experts
from qlora_train.kernels.fsdp_units import local_tensor
from qlora_train.models.moe import expert_parameters
from qlora_train.utils.errors import ModelError

Tensors = tuple[torch.Tensor, ...]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationSummary:
    """Numbers of weights, and bytes of a loaded model on this rank.

    Linear weights are all parameters of two or more dimensions except embeddings and the output head. `weight_bytes` are
    packed 4-bit weights with their scales, `whole_weight_bytes` those of all ranks, `table_bytes` code tables, one per
    tensor. `bytes_by_dtype` covers all parameters, buffers, scales and tables.
    """

    num_linear_weights: int
    num_quantized_weights: int
    weight_bytes: int
    whole_weight_bytes: int
    table_bytes: int
    bytes_by_dtype: dict[str, int]
    unquantized: tuple[str, ...]

    @property
    def quantized_share(self) -> float:
        """Share of linear weights in 4 bits, 0 to 1."""
        return self.num_quantized_weights / max(self.num_linear_weights, 1)

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, with scales and without code tables."""
        return 8 * self.whole_weight_bytes / max(self.num_quantized_weights, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the fields and what is computed from them."""
        return {
            **asdict(self), "quantized_share": self.quantized_share, "bits_per_weight": self.bits_per_weight,
            "total_bytes": self.total_bytes,
        }  # fmt: skip

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters, buffers, scales and tables."""
        return sum(self.bytes_by_dtype.values())


def summarize_quantization(model: nn.Module, heads: set[nn.Module]) -> QuantizationSummary:
    """Summarize how a model's weights are stored; `heads` are not counted as linear weights."""
    excluded = {id(module.weight) for module in heads if isinstance(module.weight, nn.Parameter)}
    excluded |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    in_4bit = {id(each.codes): each for each in _quantized_weights(model)}
    excluded |= {id(tensor) for each in in_4bit.values() for tensor in each.scales}
    linear = sum(each.num_weights for each in in_4bit.values())
    unquantized = []
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in excluded and id(parameter) not in in_4bit:
            linear += parameter.numel()
            unquantized.append(f"{name} ({_dtype_name(parameter)}, {parameter.numel():,} weights)")
    by_dtype: Counter[str] = Counter()
    states = (tensor for each in in_4bit.values() for tensor in each.unregistered)
    for tensor in (*model.parameters(), *model.buffers(), *states):
        by_dtype[_dtype_name(tensor)] += local_tensor(tensor).nbytes
    stored = [tensor for each in in_4bit.values() for tensor in (each.codes, *each.scales)]
    return QuantizationSummary(
        num_linear_weights=linear,
        num_quantized_weights=sum(each.num_weights for each in in_4bit.values()),
        weight_bytes=sum(local_tensor(tensor).nbytes for tensor in stored),
        whole_weight_bytes=sum(tensor.nbytes for tensor in stored),  # a DTensor's are those of all ranks
        table_bytes=sum(tensor.nbytes for each in in_4bit.values() for tensor in each.tables),
        bytes_by_dtype=dict(by_dtype),
        unquantized=tuple(unquantized),
    )


@dataclass(frozen=True)
class _QuantizedWeight:
    """A 4-bit weight, or this rank's part of one.

    Attributes:
        num_weights: of all ranks.
        scales: absmax of both levels, and their offset.
        tables: code tables.
        unregistered: scales and tables that are neither parameters nor buffers.
    """

    num_weights: int
    codes: torch.Tensor
    scales: Tensors
    tables: Tensors
    unregistered: Tensors


def _quantized_weights(model: nn.Module) -> Iterator[_QuantizedWeight]:
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.quant_state is not None:
            yield _linear_weight(module)
    for name, module in expert_parameters(model).items():
        found = quantized_experts(module, name.rpartition(".")[2])
        if found is not None:
            codes, stack = found
            yield _QuantizedWeight(stack.shape.numel(), codes, stack.scale_tensors, stack.table_tensors, ())


def _linear_weight(layer: Linear4bit) -> _QuantizedWeight:
    state = layer.quant_state
    absmax = layer._parameters.get("absmax")
    scales: Tensors = () if absmax is not None else (state.absmax,)
    tables: Tensors = (state.code,)
    if state.nested:
        scales, tables = (*scales, state.state2.absmax, state.offset), (*tables, state.state2.code)
    registered = () if absmax is None else (absmax,)
    return _QuantizedWeight(state.shape.numel(), layer.weight, (*registered, *scales), tables, (*scales, *tables))


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def count_frozen_weights(model: nn.Module) -> int:
    """Return the number of frozen weights, counting weights and not packed elements."""
    in_4bit = list(_quantized_weights(model))
    parts = {id(tensor) for each in in_4bit for tensor in (each.codes, *each.scales)}
    others = (each for each in model.parameters() if not each.requires_grad and id(each) not in parts)
    return sum(each.num_weights for each in in_4bit) + sum(parameter.numel() for parameter in others)


def check_quantization(summary: QuantizationSummary, min_quantized_share: float) -> None:
    """Log the summary, and check the share of 4-bit weights.

    Raises:
        ModelError: the share of 4-bit linear weights is below `min_quantized_share`.
    """
    by_dtype = ", ".join(f"{name} {count / 1e6:,.1f} MB" for name, count in sorted(summary.bytes_by_dtype.items()))
    logger.debug(
        "quantization: %.1f %% of %s linear weights in 4 bits at %.3f bits each; bytes by dtype: %s",
        100 * summary.quantized_share, f"{summary.num_linear_weights:,}", summary.bits_per_weight, by_dtype,
    )  # fmt: skip
    if summary.weight_bytes < summary.whole_weight_bytes:
        logger.debug(
            "quantization: %.1f of %.1f MB of 4-bit weights on this rank (%.1f %%, with absmax)",
            summary.weight_bytes / 1e6, summary.whole_weight_bytes / 1e6,
            100 * summary.weight_bytes / summary.whole_weight_bytes,
        )  # fmt: skip
    for name in summary.unquantized[:5]:
        logger.debug("quantization: %s stays unquantized", name)
    if summary.quantized_share < min_quantized_share:
        shown = "; ".join(summary.unquantized[:5]) + (" ..." if len(summary.unquantized) > 5 else "")
        raise ModelError(
            f"quantization.min_quantized_share: only {summary.quantized_share:.1%} of the linear weights are in 4 bits, "
            f"below {min_quantized_share:.0%}; left in 16 bits: {shown}; use a model of linear layers, or "
            "lower the limit at the cost of memory"
        )
