"""Return freed memory to the system while a model loads."""

from torch import Tensor

from qlora_train.utils.cpu_memory import return_freed_memory

TRIM_BYTES = 8 << 20


class MemoryTrimmer:
    """Returns freed memory after every `TRIM_BYTES` of tensors.

    glibc keeps a freed 16-bit tensor's memory if a smaller allocation follows it, such as the 4-bit weight. Over a whole
    model this exceeds the size of the model. Other C libraries are unaffected.
    """

    def __init__(self) -> None:
        self._bytes = 0

    def count(self, tensor: Tensor) -> Tensor:
        self._bytes += tensor.nbytes
        if self._bytes > TRIM_BYTES:
            self.trim()
        return tensor

    def trim(self) -> None:
        """Return freed memory now."""
        self._bytes = 0
        return_freed_memory()
