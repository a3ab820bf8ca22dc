"""4-bit layers whose rows are not a whole number of blocks, on a CPU.

bitsandbytes 0.50 stores them rightly and dequantises them wrongly on CPUs with AVX-512: it takes each row to begin a block
of its own. Errors are as large as the weights, in training and in evaluation, and nothing is said. These layers get a
forward that dequantises them as one row of numbers, which is how they are stored.
"""

from types import MethodType
from typing import Any

from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn import functional

from qlora_train.kernels.ops.dequantize import dequantize


def fix_partial_blocks(model: nn.Module) -> None:
    """Give such layers of a model a forward of their own."""
    for module in model.modules():
        if _is_odd(module) and module.weight.device.type == "cpu":
            module.forward = MethodType(_forward, module)


def has_partial_blocks(model: nn.Module) -> bool:
    """Say whether a model has such layers, on whatever device."""
    return any(_is_odd(module) for module in model.modules())


def _is_odd(module: Any) -> bool:
    return isinstance(module, Linear4bit) and module.in_features % module.weight.quant_state.blocksize != 0


def _forward(module: Any, x: Tensor) -> Tensor:
    weight = dequantize(module.weight.data, module.weight.quant_state, module.compute_dtype)
    bias = None if module.bias is None else module.bias.to(weight.dtype)
    return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
