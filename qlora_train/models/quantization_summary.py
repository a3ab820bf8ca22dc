"""Quantization summary: the share of weights in 4 bits, and the bytes of the model by dtype.

A weight matrix that silently stays in 16 bits is the most common failure of 4-bit loading, so every load is checked.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from torch import nn

from qlora_train.kernels.expert_weights import ExpertWeights, quantized_experts
from qlora_train.models.moe import expert_parameters
from qlora_train.utils.errors import ModelError

Tensors = tuple[torch.Tensor, ...]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationSummary:
    """Numbers of weights and bytes of a loaded model.

    Linear weights are all parameters of two or more dimensions except embeddings and the output head. `weight_bytes` are
    packed 4-bit weights with their scales, `table_bytes` bitsandbytes' code tables, one per tensor. `bytes_by_dtype` covers
    all parameters, buffers, scales and tables.
    """

    num_linear_weights: int
    num_quantized_weights: int
    weight_bytes: int
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
        return 8 * self.weight_bytes / max(self.num_quantized_weights, 1)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters, buffers, scales and tables."""
        return sum(self.bytes_by_dtype.values())


def summarize_quantization(model: nn.Module, heads: set[nn.Module]) -> QuantizationSummary:
    """Summarize how a model's weights are stored; `heads` are not counted as linear weights."""
    excluded = {id(module.weight) for module in heads if isinstance(module.weight, nn.Parameter)}
    excluded |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    quantized = weight_bytes = table_bytes = linear = 0
    by_dtype: Counter[str] = Counter()
    unquantized = []
    stacks = {id(codes): weights for codes, weights in _expert_stacks(model)}
    for name, parameter in model.named_parameters():
        by_dtype[_dtype_name(parameter)] += parameter.nbytes
        in_4bit = _in_4bit(parameter, stacks)
        if in_4bit is not None:
            num_weights, scales, tables = in_4bit
            for tensor in () if id(parameter) in stacks else (*scales, *tables):  # experts' are buffers
                by_dtype[_dtype_name(tensor)] += tensor.nbytes
            linear, quantized = linear + num_weights, quantized + num_weights
            weight_bytes += parameter.nbytes + sum(tensor.nbytes for tensor in scales)
            table_bytes += sum(tensor.nbytes for tensor in tables)
        elif parameter.ndim >= 2 and id(parameter) not in excluded:
            linear += parameter.numel()
            unquantized.append(f"{name} ({_dtype_name(parameter)}, {parameter.numel():,} weights)")
    for buffer in model.buffers():
        by_dtype[_dtype_name(buffer)] += buffer.nbytes
    return QuantizationSummary(linear, quantized, weight_bytes, table_bytes, dict(by_dtype), tuple(unquantized))


def _expert_stacks(model: nn.Module) -> Iterator[tuple[torch.Tensor, ExpertWeights]]:
    for name, module in expert_parameters(model).items():
        found = quantized_experts(module, name.rpartition(".")[2])
        if found is not None:
            yield found


def _in_4bit(parameter: nn.Parameter, stacks: dict[int, ExpertWeights]) -> tuple[int, Tensors, Tensors] | None:
    """Return the number of weights of a 4-bit parameter, its scales and its tables; None for any other."""
    if id(parameter) in stacks:
        stack = stacks[id(parameter)]
        return stack.shape.numel(), stack.scale_tensors, stack.table_tensors
    if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
        return parameter.quant_state.shape.numel(), *_state_tensors(parameter.quant_state)
    return None


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _state_tensors(state: QuantState) -> tuple[Tensors, Tensors]:
    """Return the scales (both levels with the offset if double-quantized) and the code tables of a tensor."""
    if not state.nested:
        return (state.absmax,), (state.code,)
    return (state.absmax, state.state2.absmax, state.offset), (state.code, state.state2.code)


def count_frozen_weights(model: nn.Module) -> int:
    """Return the number of frozen weights, counting weights and not packed elements."""
    stacks = {id(codes): weights for codes, weights in _expert_stacks(model)}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return sum(in_4bit[0] if (in_4bit := _in_4bit(p, stacks)) else p.numel() for p in frozen)


def check_quantization(summary: QuantizationSummary, min_quantized_share: float) -> None:
    """Log the summary, and check the share of 4-bit weights.

    Raises:
        ModelError: the share of 4-bit linear weights is below `min_quantized_share`.
    """
    by_dtype = ", ".join(f"{name} {count / 1e6:,.1f} MB" for name, count in sorted(summary.bytes_by_dtype.items()))
    logger.info(
        "quantization: %.1f %% of %s linear weights in 4 bits at %.3f bits each; bytes by dtype: %s",
        100 * summary.quantized_share, f"{summary.num_linear_weights:,}", summary.bits_per_weight, by_dtype,
    )  # fmt: skip
    for name in summary.unquantized[:5]:
        logger.info("quantization: %s stays unquantized", name)
    if summary.quantized_share < min_quantized_share:
        shown = "; ".join(summary.unquantized[:5]) + (" ..." if len(summary.unquantized) > 5 else "")
        raise ModelError(
            f"quantization.min_quantized_share: only {summary.quantized_share:.1%} of the linear weights are in 4 bits, "
            f"below {min_quantized_share:.0%}; left in 16 bits: {shown}; use a model of linear layers, or "
            "lower the limit at the cost of memory"
        )
