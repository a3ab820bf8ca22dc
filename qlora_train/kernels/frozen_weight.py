"""The weight of a frozen layer in its compute dtype: dequantized on every read, or cached."""

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from qlora_train.kernels.fsdp_units import is_sharded_tensor
from qlora_train.kernels.ops.dequantize import dequantize


def packed_weight(layer: Linear4bit) -> tuple[Tensor, QuantState]:
    """Return the codes of a 4-bit layer, (bytes, 1) uint8, and their quantization state.

    The state is the layer's own: a weight that FSDP has gathered is a plain parameter, which has none.
    """
    return layer.weight.data.view(-1, 1), layer.quant_state


class FrozenWeight:
    """The weight (out, in) of a linear layer, in 4 bits or not.

    Attributes:
        dtype: compute dtype of the layer.
        cached: the dequantized weight; None: every `read` dequantizes. Both give the same bits.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.is_quantized = isinstance(layer, Linear4bit)
        self.dtype: torch.dtype = layer.compute_dtype if self.is_quantized else layer.weight.dtype
        self.cached: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self._layer.bias
        return bias

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP holds a part of the weight on each rank."""
        return is_sharded_tensor(self._layer.weight)

    @property
    def dequantized_bytes(self) -> int:
        """Size of the cached weight; 0 for a layer that is stored in its compute dtype."""
        size: int = self._layer.in_features * self._layer.out_features
        return size * self.dtype.itemsize if self.is_quantized else 0

    def cache(self) -> None:
        """Dequantize the weight once, for all later reads."""
        self.cached = self.read()

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return the weight in `dtype`, (out, in)."""
        if self.cached is not None:
            return self.cached
        if not self.is_quantized:
            weight: Tensor = self._layer.weight
            return weight.detach()
        return dequantize(*packed_weight(self._layer), self.dtype)
