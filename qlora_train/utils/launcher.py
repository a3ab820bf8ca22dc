"""Environment variables of torchrun, srun, mpirun and `accelerate launch`.

A process of a run reads its rank from them and removes them. accelerate would read them in place of the config: LOCAL_RANK
wraps the model in DDP, ACCELERATE_MIXED_PRECISION adds autocast, ACCELERATE_DYNAMO_BACKEND compiles.
"""

import logging
import os
import re
from dataclasses import dataclass
from itertools import chain

from qlora_train.utils.errors import ModelError

logger = logging.getLogger(__name__)

_READ_BY_ACCELERATE = re.compile(
    r"(ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_.+|(LOCAL_)?(RANK|WORLD_SIZE)"
    r"|(PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_(LOCAL_)?(RANK|SIZE)|MPI_LOCAL(RANKID|NRANKS)"
)


@dataclass(frozen=True)
class Variables:
    """Names of a launcher's variables."""

    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


LAUNCHERS = (
    Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, accelerate, Kubernetes operators
    # of a job step: a batch script without srun has SLURM_NTASKS, and is one process
    Variables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    Variables(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    ),
    Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    Variables("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
"""The first whose number of processes is set counts: torchrun may run inside srun."""
RENDEZVOUS = "QLORA_TRAIN_RENDEZVOUS"
"""Variable with the rendezvous of processes that this program started."""
FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""Ports of Slurm jobs, by job id."""


@dataclass(frozen=True)
class Worker:
    """One of several processes that train together.

    Attributes:
        rank: from 0.
        world_size: number of processes, at least 2.
        local_rank: among those of its machine.
        local_world_size: number of processes on its machine.
        rendezvous: URL where the processes meet, as torch's `init_method`.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    rendezvous: str


def launched_worker() -> Worker | None:
    """Return what a launcher started this process as; None if it is not one of several.

    Raises:
        ModelError: a variable is not a number, or none names the host of rank 0.
    """
    names = _variables()
    if names is None or _number(names.world_size) <= 1:
        return None
    return Worker(
        _number(names.rank), _number(names.world_size), _number(names.local_rank, 0), _number(names.local_world_size, 1),
        _rendezvous(),
    )  # fmt: skip


def is_launched() -> bool:
    """Return whether torchrun or a relative started this process, be it as the only one."""
    return bool(os.environ.get(LAUNCHERS[0].world_size))


def take_worker() -> Worker | None:
    """Return `launched_worker`, and remove the launchers' variables: srun may have started torchrun."""
    worker = launched_worker()
    if worker is not None:
        for name in (*chain.from_iterable(vars(names).values() for names in LAUNCHERS), RENDEZVOUS):
            os.environ.pop(name, None)
    return worker


def clear_launcher_environment() -> None:
    """Remove launchers' variables; raise a ModelError if the process is one of several."""
    if worker := launched_worker():
        raise ModelError(
            f"launcher: started as one of {worker.world_size} processes, but this runs in one; start it without a "
            "launcher, or unset the launcher's variables if the job's shell sets them"
        )
    if names := sorted(filter(_READ_BY_ACCELERATE.fullmatch, os.environ)):
        logger.info("launcher: ignores %s (the config decides)", ", ".join(names))
    for name in names:
        del os.environ[name]


def _variables() -> Variables | None:
    return next((names for names in LAUNCHERS if os.environ.get(names.world_size)), None)


def _number(name: str, default: int | None = None) -> int:
    """Return a variable, a number; of Slurm's `4(x2),1`, machines of 4, 4 and 1 tasks, the first."""
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if found := re.match(r"\d+", text):
        return int(found[0])
    raise ModelError(f"launcher: {name} is {text!r}, not a number; start the processes with torchrun")


def _rendezvous() -> str:
    if url := os.environ.get(RENDEZVOUS):
        return url
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None and (nodes := os.environ.get("SLURM_STEP_NODELIST")):
        host = _first_host(nodes)
    if port is None and (job := os.environ.get("SLURM_JOB_ID")):
        port = str(FIRST_PORT + int(job) % NUM_PORTS)
    if not host or not port:
        raise ModelError(
            "launcher: MASTER_ADDR and MASTER_PORT are not set; set them to the host of rank 0 and a free port there, or "
            "start the processes with torchrun"
        )
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list, such as `gpu[07-09,12],login`."""
    found = re.match(r"([^,[]+)(?:\[(\w+))?", nodes)
    return (found[1] + (found[2] or "")) if found else nodes
