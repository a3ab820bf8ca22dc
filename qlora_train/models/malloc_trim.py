"""Memory that is freed while a model loads, given back to the system as it loads."""

import ctypes
from typing import Any

from torch import Tensor

KEPT_FREE_BYTES = 8 << 20
"""Bytes of tensors that may have gone by since freed memory was last given back."""


class MemoryTrimmer:
    """Gives freed memory back while tensors come and go.

    glibc keeps the space of a freed tensor when something smaller lies behind it: 4-bit weights behind 16-bit ones, or
    behind the float32 copies that quantising makes of them. After a whole model, that is more than the size of the model.
    Other C libraries are left alone.
    """

    def __init__(self) -> None:
        self._give_back: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._bytes = 0

    def count(self, tensor: Tensor) -> Tensor:
        """Count a tensor that has come, and return it."""
        self._bytes += tensor.nbytes
        if self._bytes > KEPT_FREE_BYTES and self._give_back is not None:
            self._give_back(0)
            self._bytes = 0
        return tensor
