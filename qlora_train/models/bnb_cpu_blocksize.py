"""bitsandbytes CPU blocksize workaround: 4-bit layers whose rows are not a whole number of blocks.

bitsandbytes 0.50 quantizes such layers correctly, but dequantizes them on CPUs with AVX-512 as if each row began with a new
block. The errors are as large as the weights, without a message. Here these layers dequantize the flattened weight, as it
is stored.
"""

from types import MethodType
from typing import Any

from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn import functional

from qlora_train.kernels.frozen_weight import packed_weight
from qlora_train.kernels.ops.dequantize import dequantize


def fix_partial_blocks(model: nn.Module) -> None:
    """Replace the forward of affected layers on the CPU."""
    for module in model.modules():
        if _has_partial_blocks(module) and module.weight.device.type == "cpu":
            module.forward = MethodType(_forward, module)


def has_partial_blocks(model: nn.Module) -> bool:
    """Whether a model has such layers, on any device."""
    return any(_has_partial_blocks(module) for module in model.modules())


def _has_partial_blocks(module: Any) -> bool:
    return isinstance(module, Linear4bit) and module.in_features % module.quant_state.blocksize != 0


def _forward(module: Any, x: Tensor) -> Tensor:
    weight = dequantize(*packed_weight(module), module.compute_dtype)
    bias = None if module.bias is None else module.bias.to(weight.dtype)
    return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
