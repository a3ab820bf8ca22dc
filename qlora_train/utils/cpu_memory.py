"""Memory of a process on a CPU beside its tensors: kernels that oneDNN compiles and caches, and the C library's heap."""

import ctypes
import os
from functools import cache
from typing import Any

KERNEL_CACHE_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Of oneDNN, and of ideep, through which torch calls it: each keeps kernels that the other has dropped."""
MAX_KERNELS = 128
"""Kernels in each cache, where the default is 1024. A decoder layer takes about 80 of them in a micro-batch, and the next
layer the same ones; compiling one takes 0.3 ms."""


def limit_kernel_caches() -> None:
    """Limit the kernels of 16-bit products, 0.55 MB each: every product and number of tokens has its own.

    The limits are read once, at the first such product of the process. The user's values win.
    """
    for variable in KERNEL_CACHE_VARIABLES:
        os.environ.setdefault(variable, str(MAX_KERNELS))


def return_freed_memory() -> None:
    """Return what tensors freed and the heap keeps to the system; C libraries other than glibc are unaffected.

    glibc's heap keeps tensors of up to 32 MB each. Those of the next step have other sizes and do not fit in between.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
