"""The weight of a frozen layer in its compute dtype: dequantized when it is needed, or cached."""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from qlora_train.kernels.ops.dequantize import dequantize


class FrozenWeight:
    """The weight of a linear layer, in 4 bits or not, as (out, in).

    Attributes:
        dtype: what the layer computes in.
        kept: a copy in `dtype`, where the memory for it was given; its numbers are those of `read` without it.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.is_quantized = isinstance(layer, Linear4bit)
        self.dtype: torch.dtype = layer.compute_dtype if self.is_quantized else layer.weight.dtype
        self.kept: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, (out,)."""
        bias: Tensor | None = self._layer.bias
        return bias

    @property
    def copy_bytes(self) -> int:
        """What a kept copy takes; 0 for a layer that is stored in the dtype it computes in."""
        size: int = self._layer.in_features * self._layer.out_features
        return size * self.dtype.itemsize if self.is_quantized else 0

    def keep(self) -> None:
        """Cache the dequantized weight from now on."""
        self.kept = self.read()

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return the weight in `dtype`, (out, in)."""
        if self.kept is not None:
            return self.kept
        weight: Tensor = self._layer.weight
        if not self.is_quantized:
            return weight.detach()
        return dequantize(weight.data, self._layer.weight.quant_state, self.dtype)
