"""This process among the processes of a run: its rank, and what it exchanges with the others.

`context()` returns it. In a run of one process every exchange is trivial, and torch.distributed is not imported; the
context of several processes is `process_group.ProcessGroupContext`. Nothing else determines the rank.

Every method but the properties and `peer_errors` is a collective: all ranks call it, in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")


class Context:
    """A run of one process.

    Attributes:
        rank: of this process, from 0.
        world_size: processes of the run.
        local_rank: of this process among those of its machine.
        local_world_size: processes of the run on this machine.
    """

    rank = local_rank = 0
    world_size = local_world_size = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder: rank 0."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this process prepares what the processes of its machine share."""
        return self.local_rank == 0

    def barrier(self) -> None:
        """Wait until every rank has come here, however long that takes."""

    def sum_(self, tensor: "Tensor") -> "Tensor":
        """Replace a tensor by its sum over all ranks, in place, and return it; the result is bitwise equal on all ranks."""
        return tensor

    def all_true(self, flag: bool) -> bool:
        """Return whether `flag` is true on every rank."""
        return flag

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value, a picklable object; that of the other ranks is ignored."""
        return value

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, picklable objects, by rank."""
        return [value]

    @contextmanager
    def peer_errors(self) -> Iterator[None]:
        """Raise a ProcessGroupError if a collective of torch itself, such as FSDP's, fails inside; no collective."""
        yield

    def leave(self) -> None:
        """Disconnect from the other ranks; from here on each process is a run of its own."""

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Let one process of each machine run the block before the others, which then find what it prepared."""
        if not self.is_local_main:
            self.barrier()
        yield
        if self.is_local_main:
            self.barrier()


class _Process:
    context = Context()


def context() -> Context:
    """Return the context of this process."""
    return _Process.context


def set_context(joined: Context) -> None:
    """Make a context that of this process."""
    _Process.context = joined
