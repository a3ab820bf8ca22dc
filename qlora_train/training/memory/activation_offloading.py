"""Activation offloading: what autograd saves is in page-locked host memory until the backward pass needs it.

Copies run on a stream of their own while the GPU computes: a tensor is copied out while the layer that read it computes and
prefetched while the tensor saved after it is used. So at most two are on the GPU at a time. The last one stays there.

Host memory comes in page-locked slabs that are filled to the last byte; torch would round each tensor up to a power of two.
"""

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_train.training.memory.activation_checkpointing import ignoring_weights
from qlora_train.utils.errors import TrainingError, first_line, is_out_of_memory
from qlora_train.utils.host_memory import available_bytes

logger = logging.getLogger(__name__)

SLAB_BYTES = 64 << 20
MIN_BYTES = 1 << 20
"""Smaller tensors stay on the GPU: copying takes longer than they save."""
HOST_RESERVE_BYTES = 1 << 30
"""Host memory left to everything else."""


class Slabs:
    """Host memory that is allocated in order and freed all at once.

    Args:
        pinned: page-locked, which asynchronous copies need.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._slabs: list[Tensor] = []
        self._used_bytes = 0

    def clear(self) -> None:
        """Free all memory for the next forward pass."""
        self._used_bytes = 0

    def allocate(self, num_bytes: int) -> list[Tensor]:
        """Return memory, uint8, in pieces.

        Raises:
            MemoryError: the host has too little.
        """
        pieces = []
        while num_bytes:
            slab, begin = divmod(self._used_bytes, SLAB_BYTES)
            if slab == len(self._slabs):
                self._slabs.append(self._new_slab())
            piece = self._slabs[slab][begin : begin + num_bytes]
            pieces.append(piece)
            self._used_bytes += len(piece)
            num_bytes -= len(piece)
        return pieces

    def _new_slab(self) -> Tensor:
        available = available_bytes()
        if available < SLAB_BYTES + HOST_RESERVE_BYTES:
            used = len(self._slabs) * SLAB_BYTES
            left = f"the host has {available / 1e9:.1f} GB left, beside {used / 1e9:.1f} GB of activations"
            raise MemoryError(f"activation offloading: {left}")
        try:
            return torch.empty(SLAB_BYTES, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            if not (self._pinned and is_out_of_memory(error)):
                raise
            logger.warning("activation offloading: no more page-locked memory (%s); slower copies", first_line(error))
            self._pinned = False
            return torch.empty(SLAB_BYTES, dtype=torch.uint8)


@dataclass(slots=True, eq=False)
class _Offloaded:
    """An offloaded tensor.

    Attributes:
        index: among those of this forward pass.
        host: its bytes, in memory order.
        order: of its dimensions in memory.
        shape: in that order.
        on_device: the tensor on the device, complete or while a copy runs.
        version: of `on_device`, to detect changes in place.
        copied: event after the last copy.
        is_used: by the backward pass, so it is not prefetched again.
    """

    index: int
    host: Sequence[Tensor]
    order: Sequence[int]
    shape: torch.Size
    dtype: torch.dtype
    on_device: Tensor | None
    version: int
    copied: Any = None
    is_used: bool = False


class ActivationOffloading:
    """Offloads what autograd saves; a forward pass may begin after the backward pass of the one before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: Any = torch.get_device_module(device)
        self._copy_stream = self._streams.Stream()
        self._slabs = Slabs(pinned=device.type == "cuda")
        self._offloaded: list[_Offloaded] = []
        # after a failure, memory must not be reused before its copies are complete
        weakref.finalize(self, self._streams.synchronize).atexit = False

    @contextmanager
    def forward_pass(self, model: nn.Module) -> Iterator[None]:
        """Offload the saved tensors of a forward pass, except weights and small ones.

        Of checkpointed layers these are their inputs.
        """
        self._streams.current_stream().wait_stream(self._copy_stream)
        self._offloaded.clear()
        self._slabs.clear()
        with ignoring_weights(model, saved_tensors_hooks(self._pack, self._unpack)):
            yield

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.nbytes < MIN_BYTES or tensor.device != self._device:
            return tensor
        # memory order is preserved: in another one, kernels would round differently
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        dense = tensor.detach().permute(order).contiguous()  # copies only tensors with gaps
        host = self._slabs.allocate(dense.nbytes)
        offloaded = _Offloaded(len(self._offloaded), host, order, dense.shape, dense.dtype, dense, dense._version)
        self._copy(offloaded, host, _pieces(dense, host))
        if self._offloaded and not self._offloaded[-1].is_used:  # a loss may compute its gradient in the forward pass
            self._release(self._offloaded[-1])
        self._offloaded.append(offloaded)
        return offloaded

    def _release(self, offloaded: _Offloaded) -> Tensor:
        """Wait for a tensor's last copy and return it without holding it any longer.

        Raises:
            TrainingError: it was changed in place.
        """
        tensor, offloaded.on_device = offloaded.on_device, None
        assert tensor is not None, "released once per copy"
        if tensor._version != offloaded.version:
            raise TrainingError(
                "train.activation_offloading: true, but this model changes a tensor in place that the backward pass needs; "
                "set it to false"
            )
        self._streams.current_stream().wait_event(offloaded.copied)
        return tensor

    def _unpack(self, packed: _Offloaded | Tensor) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        index = packed.index
        if index >= len(self._offloaded) or self._offloaded[index] is not packed:
            raise RuntimeError("another forward pass reused the host memory of a graph before its backward pass")
        self._fetch(packed)
        packed.is_used = True
        if index and not self._offloaded[index - 1].is_used:
            self._fetch(self._offloaded[index - 1])
        tensor = self._release(packed)
        return tensor.permute([packed.order.index(dim) for dim in range(tensor.dim())])

    def _fetch(self, offloaded: _Offloaded) -> None:
        """Start to copy a tensor to the device, unless it is there or a copy runs."""
        if offloaded.on_device is None:
            tensor = offloaded.on_device = torch.empty(offloaded.shape, dtype=offloaded.dtype, device=self._device)
            self._copy(offloaded, _pieces(tensor, offloaded.host), offloaded.host)
            offloaded.version = tensor._version

    def _copy(self, offloaded: _Offloaded, to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
        """Copy after all earlier work of the current stream, in parallel with later work."""
        self._copy_stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._copy_stream):
            for piece, content in zip(to, source, strict=True):
                piece.copy_(content, non_blocking=True)
            offloaded.copied = self._copy_stream.record_event()


def _pieces(dense: Tensor, host: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the bytes of a tensor, split as in host memory."""
    return dense.view(-1).view(torch.uint8).split([len(piece) for piece in host])
