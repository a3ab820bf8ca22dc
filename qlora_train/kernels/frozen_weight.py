"""The weight of a frozen layer in the dtype it is computed in: dequantised when it is needed, or kept; and in float8."""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from qlora_train.kernels.dequantize import dequantize
from qlora_train.kernels.float8 import OF_SIZE, Float8, in_float8


class FrozenWeight:
    """The weight of a linear layer, in 4 bits or not, as (out, in).

    Attributes:
        dtype: what the layer computes in.
        kept: a copy in `dtype`, where the memory for it was given; its numbers are those of `read` without it.
        multiplies_in_float8: whether the forward pass rounds it, and what it is multiplied with, to float8.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.is_quantized = isinstance(layer, Linear4bit)
        self.dtype: torch.dtype = layer.compute_dtype if self.is_quantized else layer.weight.dtype
        self.kept: Tensor | None = None
        self._kept_in_float8: Float8 | None = None
        self.multiplies_in_float8 = False

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, (out,)."""
        bias: Tensor | None = self._layer.bias
        return bias

    @property
    def copy_bytes(self) -> int:
        """What a kept copy takes; 0 for a layer that is stored in the dtype it computes in."""
        size: int = self._layer.in_features * self._layer.out_features
        return size * (self.dtype.itemsize + self.multiplies_in_float8) if self.is_quantized else 0

    @property
    def has_float8(self) -> bool:
        """Whether the forward pass can multiply in float8."""
        sizes = self._layer.in_features, self._layer.out_features
        return self.dtype == torch.bfloat16 and not any(size % OF_SIZE for size in sizes)

    def keep(self) -> None:
        """Keep a copy from now on, and one in float8 where the forward pass reads that."""
        self.kept = self.read()
        if self.multiplies_in_float8:
            self._kept_in_float8 = self.read_in_float8()

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return the weight in `dtype`, (out, in)."""
        if self.kept is not None:
            return self.kept
        weight: Tensor = self._layer.weight
        if not self.is_quantized:
            return weight.detach()
        return dequantize(weight.data, self._layer.weight.quant_state, self.dtype)

    @torch.no_grad()
    def read_in_float8(self) -> Float8:
        """Return the weight rounded to float8, (out, in)."""
        return in_float8(self.read()) if self._kept_in_float8 is None else self._kept_in_float8
