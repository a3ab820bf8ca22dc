"""The context of several processes: collectives of torch.distributed, gloo for host tensors and NCCL for GPU tensors.

accelerate and the Trainer are not told: each process is one of its own to them, and what is exchanged is written out where
it is needed.

While a process waits for others it handles signals: it waits for asynchronous collectives in Python. A process that ends
closes its connections, so that the others' collectives raise `ProcessGroupError` at once.
"""

import logging
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_train.parallel.context import Context, context, set_context
from qlora_train.utils import signals
from qlora_train.utils.errors import ModelError, ProcessGroupError, first_line
from qlora_train.utils.launcher import Worker
from qlora_train.utils.nvidia_driver import gpu_problem

Value = TypeVar("Value")
logger = logging.getLogger(__name__)

STEP_TIMEOUT = timedelta(minutes=30)
"""For the processes to connect, and for sums: a rank that hangs ends the run."""
PATIENT_TIMEOUT = timedelta(days=7)
"""For barriers and objects: one rank may tokenise the data of all."""
REMOTE_ERROR = "ncclRemoteError"
"""In NCCL's message if another process has ended, or the network to it."""
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1e-4, 0.02
WAITED_SHARE = 0.05
"""Of the time waited so far: a rank continues at most 5 % late."""


class ProcessGroupContext(Context):
    """A run of several processes, which `joined` connects."""

    def __init__(self, worker: Worker) -> None:
        self.rank, self.world_size = worker.rank, worker.world_size
        self.local_rank, self.local_world_size = worker.local_rank, worker.local_world_size
        self._patient: Any = dist.new_group(backend="gloo", timeout=PATIENT_TIMEOUT)

    def barrier(self) -> None:
        """Wait until every rank has come here, however long that takes."""
        self._reduce(torch.zeros(1, dtype=torch.int64), self._patient)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks, in place, and return it; the result is bitwise equal on all ranks."""
        return self._reduce(tensor, None)

    def all_true(self, flag: bool) -> bool:
        """Return whether `flag` is true on every rank."""
        return int(self._reduce(torch.tensor([int(not flag)]), self._patient)) == 0

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value, a picklable object; that of the other ranks is ignored."""
        self.barrier()
        values = [value]
        with _peer_errors():
            dist.broadcast_object_list(values, src=0, group=self._patient)
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, picklable objects, by rank."""
        self.barrier()
        values: list[Any] = [None] * self.world_size
        with _peer_errors():
            dist.all_gather_object(values, value, group=self._patient)
        return values

    @contextmanager
    def peer_errors(self) -> Iterator[None]:
        """Raise a ProcessGroupError if a collective of torch itself, such as FSDP's, fails inside; no collective."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            with _peer_errors():
                raise

    def leave(self) -> None:
        """Disconnect from the other ranks; from here on each process is a run of its own."""
        self.barrier()
        dist.destroy_process_group()
        set_context(Context())

    def _reduce(self, tensor: Tensor, group: Any) -> Tensor:
        with _peer_errors():
            work = dist.all_reduce(tensor, group=group, async_op=True)
            assert work is not None
            started = time.monotonic()
            while tensor.device.type == "cpu" and not work.is_completed():
                waited = time.monotonic() - started
                time.sleep(min(max(MIN_PAUSE_SECONDS, WAITED_SHARE * waited), MAX_PAUSE_SECONDS))
            work.wait()
        return tensor


@contextmanager
def joined(worker: Worker) -> Iterator[ProcessGroupContext]:
    """Connect this process with the others, and make their context that of this process inside.

    Raises:
        ProcessGroupError: the others do not start in time.
        ModelError: some of the processes have a GPU, and others have none.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(0)  # the only one that is visible
    try:
        dist.init_process_group(
            backend, init_method=worker.rendezvous, rank=worker.rank, world_size=worker.world_size, timeout=STEP_TIMEOUT
        )
        joined_context = ProcessGroupContext(worker)
    except (RuntimeError, ValueError) as error:
        signals.raise_if_requested()
        raise ProcessGroupError(
            f"rank {worker.rank}: cannot connect to the other processes at {worker.rendezvous}: {first_line(error)}; if "
            "the host is right, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface that reaches it"
        ) from error
    set_context(joined_context)
    try:
        check_gpus(joined_context.gather(_gpu()))
        if torch.cuda.is_available():
            # NCCL connects at its first sum: errors come before the model is loaded, buffers before memory is probed
            joined_context.sum_(torch.zeros(1, device="cuda"))
        yield joined_context
    finally:
        set_context(Context())
        # after a failure NCCL would wait for processes that have ended
        if dist.is_initialized() and (sys.exception() is None or backend == "gloo"):
            dist.destroy_process_group()


class Gpu(NamedTuple):
    """The GPU of a rank.

    Attributes:
        host: name of its machine.
        name: None without a GPU that works.
        problem: why there is none.
        uuid: tells it from others of its machine.
    """

    host: str
    name: str | None
    problem: str | None = None
    uuid: str | None = None


def _gpu() -> Gpu:
    if torch.cuda.is_available():
        return Gpu(platform.node(), torch.cuda.get_device_name(0), uuid=str(torch.cuda.get_device_properties(0).uuid))
    return Gpu(platform.node(), None, gpu_problem())


def check_gpus(gpus: Sequence[Gpu]) -> None:
    """Check that every rank has a GPU of its own, or none has: NCCL would wait for those without.

    Raises:
        ModelError: names the first rank without one.
    """
    first_rank: dict[tuple[str, str], int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu.uuid and (other := first_rank.setdefault((gpu.host, gpu.uuid), rank)) != rank:
            raise ModelError(
                f"rank {rank} on {gpu.host}: its GPU is that of rank {other}; start at most as many processes as GPUs, "
                "each with its own LOCAL_RANK, as torchrun does, or its own CUDA_VISIBLE_DEVICES"
            )
    names = {gpu.name for gpu in gpus}
    if len(names) == 1:
        return
    if None in names:
        rank, gpu = next((rank, gpu) for rank, gpu in enumerate(gpus) if gpu.name is None)
        raise ModelError(
            f"rank {rank} on {gpu.host}: {gpu.problem or 'GPU: torch finds none there'}; other processes have a GPU: start "
            "as many as there are GPUs that work"
        )
    if context().is_main:
        kinds = ", ".join(sorted(filter(None, names)))
        logger.warning(
            "processes: GPUs of several kinds (%s); a checkpoint stops the run if they round differently", kinds
        )


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Raise a ProcessGroupError if another process has ended; a stop that this process was asked for comes first."""
    try:
        yield
    except RuntimeError as error:
        signals.raise_if_requested()
        text = str(error)
        if "NCCL" in text and REMOTE_ERROR not in text:
            problem = f"NCCL fails ({text.strip().splitlines()[-1]}); NCCL_DEBUG=INFO in the environment shows more"
        else:
            problem = f"another process of the run has ended ({first_line(error)}); its own message says why"
        raise ProcessGroupError(
            f"rank {dist.get_rank()}: {problem}; complete files are intact, and the same command resumes"
        ) from error
