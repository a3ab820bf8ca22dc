"""Counts the bytes of live tensors; works on fake tensors too."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the live storages that operations returned.

    A 4-bit matrix product of bitsandbytes counts the weight that it may dequantize inside.

    Attributes:
        live: current bytes.
        peak: peak bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self.counts(leaf):
                self._add(leaf.untyped_storage())
        inside_bytes = 2 * math.prod(args[2]) if str(func) == "bitsandbytes.gemm_4bit.default" else 0
        self.peak = max(self.peak, self.live + inside_bytes)
        return result

    def counts(self, _tensor: Tensor) -> bool:
        """Return whether a tensor's storage is counted."""
        return True

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Count a known storage with the size that it has now."""
        if (key := storage._cdata) in self._sizes:
            self.live += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
