"""What the backward pass needs, kept in the host's memory until then, and copied both ways while the GPU computes.

A tensor leaves in a stream of its own while the layer that read it computes; when the next one leaves, computing waits for
that copy, and the memory is free. On the way back a tensor comes while the one before it is used. So two of them are on the
GPU at a time, whatever the number of layers, and each is there before it is asked for if a layer computes longer than it
takes to copy what it read. What left last never has to come back.

The host's memory is taken in slabs that are page-locked once and filled to the last byte: allocations of their own would be
rounded up to powers of two.
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

from qlora_train.utils.errors import TrainingError, first_line, is_out_of_memory
from qlora_train.utils.host_memory import available_bytes

logger = logging.getLogger(__name__)

SLAB_BYTES = 64 << 20
SMALLEST_BYTES = 1 << 20
"""Smaller tensors stay: to move them takes longer than they save."""
HOST_RESERVE_BYTES = 1 << 30
"""What is left to everything else on the host."""


class Slabs:
    """The host's memory for tensors that come back in the reverse of the order in which they left.

    Args:
        pinned: page-locked, without which copies are not asynchronous.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._slabs: list[Tensor] = []
        self._used_bytes = 0

    def clear(self) -> None:
        """Have everything free again."""
        self._used_bytes = 0

    def take(self, num_bytes: int) -> list[Tensor]:
        """Return memory, uint8, in pieces.

        Raises:
            MemoryError: the host has too little.
        """
        pieces = []
        while num_bytes:
            slab, begin = divmod(self._used_bytes, SLAB_BYTES)
            if slab == len(self._slabs):
                self._slabs.append(self._slab())
            piece = self._slabs[slab][begin : begin + num_bytes]
            pieces.append(piece)
            self._used_bytes += len(piece)
            num_bytes -= len(piece)
        return pieces

    def _slab(self) -> Tensor:
        available = available_bytes()
        if available < SLAB_BYTES + HOST_RESERVE_BYTES:
            taken = len(self._slabs) * SLAB_BYTES
            raise MemoryError(f"the host has {available / 1e9:.1f} GB left, beside {taken / 1e9:.1f} GB of activations")
        try:
            return torch.empty(SLAB_BYTES, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            if not (self._pinned and is_out_of_memory(error)):
                raise
            logger.warning("activation_offloading: no more page-locked memory (%s); slower copies", first_line(error))
            self._pinned = False
            return torch.empty(SLAB_BYTES, dtype=torch.uint8)


@dataclass(slots=True, eq=False)
class _Moved:
    """A tensor that left.

    Attributes:
        place: among those of this forward pass.
        host: its bytes, in the order of its memory.
        order: of its dimensions in memory.
        shape: in that order.
        here: it, while it is on the device, or on its way in one direction.
        version: of `here`, whose numbers nobody may change meanwhile.
        copied: when the last copy is done.
        came_back: once at least, so that it is not fetched before it is asked for again.
    """

    place: int
    host: Sequence[Tensor]
    order: Sequence[int]
    shape: torch.Size
    dtype: torch.dtype
    here: Tensor | None
    version: int
    copied: Any = None
    came_back: bool = False


class ActivationOffloading:
    """Keeps what autograd saves on the host; one for all forward passes of a trainer, each before the next begins.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: Any = torch.get_device_module(device)
        self._copying = self._streams.Stream()
        self._slabs = Slabs(pinned=device.type == "cuda")
        self._moved: list[_Moved] = []
        # memory that is still being copied must not be given to others when this is dropped after a failure
        weakref.finalize(self, self._streams.synchronize).atexit = False

    @contextmanager
    def forward_pass(self, model: nn.Module) -> Iterator[None]:
        """Move what autograd saves for the backward pass, but for weights, which stay anyway, and small tensors.

        Layers that are computed again save their inputs alone, so that these alone are moved.
        """
        self._streams.current_stream().wait_stream(self._copying)
        self._moved.clear()
        self._slabs.clear()
        with ignoring_weights(model, saved_tensors_hooks(self._leave, self._come_back)):
            yield

    def _leave(self, tensor: Tensor) -> Any:
        if tensor.nbytes < SMALLEST_BYTES or tensor.device != self._device:
            return tensor
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        dense = tensor.detach().permute(order).contiguous()  # a copy for tensors with gaps alone
        host = self._slabs.take(dense.nbytes)
        moved = _Moved(len(self._moved), host, order, dense.shape, dense.dtype, dense, dense._version)
        self._copy(moved, moved.host, _bytes_of(dense).split([len(piece) for piece in moved.host]))
        if self._moved and not self._moved[-1].came_back:  # as a loss does that makes its gradient in the forward pass
            self._let_go(self._moved[-1])
        self._moved.append(moved)
        return moved

    def _let_go(self, moved: _Moved) -> Tensor:
        """Return a tensor when its last copy is done, and hold it no longer.

        Raises:
            TrainingError: its numbers were changed meanwhile.
        """
        here, moved.here = moved.here, None
        assert here is not None, "nobody else lets it go"
        if here._version != moved.version:
            raise TrainingError(
                "train.activation_offloading: true, but this model changes a tensor in place that the backward pass needs; "
                "set it to false"
            )
        self._streams.current_stream().wait_event(moved.copied)
        return here

    def _come_back(self, moved: _Moved | Tensor) -> Tensor:
        if isinstance(moved, Tensor):
            return moved
        if moved.place >= len(self._moved) or self._moved[moved.place] is not moved:
            raise RuntimeError("another forward pass took the host memory of a graph that has no backward pass yet")
        self._fetch(moved)
        moved.came_back = True
        if moved.place and not self._moved[moved.place - 1].came_back:
            self._fetch(self._moved[moved.place - 1])
        tensor = self._let_go(moved)
        return tensor.permute([moved.order.index(dim) for dim in range(tensor.dim())])

    def _fetch(self, moved: _Moved) -> None:
        """Begin to copy a tensor back that is neither here nor on its way."""
        if moved.here is None:
            moved.here = torch.empty(moved.shape, dtype=moved.dtype, device=self._device)
            self._copy(moved, _bytes_of(moved.here).split([len(piece) for piece in moved.host]), moved.host)
            moved.version = moved.here._version

    def _copy(self, moved: _Moved, to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
        """Copy when all that was asked for before is computed, beside what is asked for next."""
        self._copying.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._copying):
            for piece, content in zip(to, source, strict=True):
                piece.copy_(content, non_blocking=True)
            moved.copied = self._copying.record_event()


def _bytes_of(dense: Tensor) -> Tensor:
    return dense.view(-1).view(torch.uint8)


def ignoring_weights(model: nn.Module, hooks: saved_tensors_hooks) -> saved_tensors_hooks:
    """Return hooks that leave a model's weights, and views of them, alone."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in weights else hooks.pack_hook(tensor)

    def unpack(kept: Any) -> Tensor:
        unpacked: Tensor = kept if isinstance(kept, Tensor) else hooks.unpack_hook(kept)
        return unpacked

    return saved_tensors_hooks(pack, unpack)
