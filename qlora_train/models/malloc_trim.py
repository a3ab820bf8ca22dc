"""Return freed memory to the system while a model loads."""

import ctypes
from typing import Any

from torch import Tensor

TRIM_BYTES = 8 << 20


class MemoryTrimmer:
    """Calls glibc's `malloc_trim` after every `TRIM_BYTES` of tensors.

    glibc keeps a freed 16-bit tensor's memory if a smaller allocation follows it, such as the 4-bit weight. Over a whole
    model this exceeds the size of the model. Other C libraries are unaffected.
    """

    def __init__(self) -> None:
        self._malloc_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._bytes = 0

    def count(self, tensor: Tensor) -> Tensor:
        self._bytes += tensor.nbytes
        if self._bytes > TRIM_BYTES:
            self.trim()
        return tensor

    def trim(self) -> None:
        """Return freed memory now."""
        self._bytes = 0
        if self._malloc_trim is not None:
            self._malloc_trim(0)
