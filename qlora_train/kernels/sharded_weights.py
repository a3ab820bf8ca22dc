"""4-bit weights as FSDP shards them: codes and absmax are parameters whose rows are quantization blocks.

`fully_shard` cuts a parameter at its first dimension. With one block per row every rank holds whole blocks and their
absmax. Both are uint8: on CUDA FSDP copies with `torch._foreach_copy_`, which rewrites NaN bit patterns of floats and would
corrupt packed weights in a float dtype (pytorch#159333). Second-level absmax (0.05 % of the bytes) and code tables are
replicated.
"""

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora_train.kernels.block_sizes import BLOCK_SIZE
from qlora_train.kernels.expert_weights import ExpertWeights, quantized_experts


def as_blocks(tensor: Tensor) -> nn.Parameter:
    """Return the bytes of codes, (blocks, 32), or of absmax, (blocks,), as a frozen parameter with one row per block."""
    rows = tensor.unsqueeze(1) if tensor.ndim == 1 else tensor
    return nn.Parameter(rows.contiguous().view(torch.uint8), requires_grad=False)


class ShardedQuantState(QuantState):
    """The quantization state of a layer whose absmax is its parameter `absmax`, which FSDP gathers with the weight.

    Args:
        layer: that has the parameter.
        state: everything else.
    """

    def __init__(self, layer: nn.Module, state: QuantState) -> None:
        self.__dict__.update({name: value for name, value in vars(state).items() if name != "absmax"})
        self._layer = layer

    @property
    def absmax(self) -> Tensor:
        """Absmax of all blocks, uint8 if double-quantized, else float32."""
        stored: Tensor = self._layer.absmax  # type: ignore[assignment]
        return stored.view(-1) if self.nested else stored.view(torch.float32).view(-1)


def has_whole_blocks(shape: torch.Size) -> bool:
    """Return whether a weight is a whole number of blocks; others are cut anywhere, and their absmax is replicated."""
    return shape.numel() % BLOCK_SIZE == 0


def num_blocks(shape: torch.Size) -> int:
    """Return the blocks of a weight that is a whole number of them."""
    return shape.numel() // BLOCK_SIZE


def prepare_linear(layer: Linear4bit) -> None:
    """Turn codes and absmax of a layer into parameters with one row per block, with the same bytes."""
    state = layer.quant_state
    layer.register_forward_pre_hook(lambda module, _inputs: describe_weight(module))
    if has_whole_blocks(state.shape) and not isinstance(state, ShardedQuantState):
        set_blocks(layer, layer.weight.data.view(num_blocks(state.shape), -1), state.absmax, state)
    elif not isinstance(state, ShardedQuantState):
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)


def describe_weight(layer: Linear4bit) -> None:
    """Set what bitsandbytes and PEFT read from the weight of a 4-bit layer, which FSDP replaces."""
    state = layer.quant_state
    layer.weight.quant_state = state
    layer.weight.compress_statistics, layer.weight.quant_type = state.nested, state.quant_type


def set_blocks(layer: Linear4bit, codes: Tensor, absmax: Tensor, state: QuantState) -> None:
    """Set a layer's weight, of all blocks or of those of this rank.

    Args:
        codes: (blocks, 32) uint8.
        absmax: (blocks,), uint8 or float32.
        state: of the whole weight; its absmax is ignored.
    """
    layer.weight = as_blocks(codes)
    layer.register_parameter("absmax", as_blocks(absmax))
    layer.quant_state = ShardedQuantState(layer, state)


def prepare_experts(module: nn.Module, name: str) -> None:
    """Turn codes and absmax of an expert stack into parameters with one row per block, with the same bytes."""
    found = quantized_experts(module, name)
    assert found is not None, f"{name} is not in 4 bits"
    codes, weights = found
    if has_whole_blocks(weights.shape[1:]) and not weights.has_block_rows:
        rows = num_blocks(weights.shape)
        set_expert_blocks(module, name, weights, codes.data.view(rows, -1), weights.absmax.view(rows, -1))


def set_expert_blocks(module: Any, name: str, weights: ExpertWeights, codes: Tensor, absmax: Tensor) -> None:
    """Set the codes and absmax of a stack, of all blocks or of those of this rank (see `set_blocks`)."""
    module.parametrizations[name].original = as_blocks(codes)
    weights.set_absmax_blocks(as_blocks(absmax))
