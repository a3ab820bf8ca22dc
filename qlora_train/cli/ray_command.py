"""`qlora-train ray CONFIG`: the same run on a Ray cluster; Ray places the processes, and restarts them after a failure.

Each Ray worker runs `qlora-train CONFIG` in a process of its own: signals need a main thread, and a GPU is chosen before
CUDA is initialised. If a worker or its machine is lost, Ray ends the other workers and starts all of them again; the run
then resumes from its last checkpoint. No other module knows of Ray.
"""

import logging
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from qlora_train.cli.options import ConfigFile, Offline, Overrides
from qlora_train.cli.output import log_flags
from qlora_train.parallel import parent_link
from qlora_train.utils.errors import ConfigError, TrainingError
from qlora_train.utils.signals import STATUS

logger = logging.getLogger(__name__)

FINAL_STATUSES = {0, 2, *STATUS.values()}
"""Exit statuses after which a restart is of no use: done, an error of the user, stopped."""
MAX_WAIT_SECONDS = 7 * 24 * 3600

Workers = Annotated[
    str, typer.Option(metavar="N|MIN:MAX", help="Processes, one per GPU; a range follows the size of the cluster")
]
CpusPerWorker = Annotated[int, typer.Option(min=1, help="CPUs reserved for a process, and its threads")]
MaxFailures = Annotated[int, typer.Option(min=-1, help="Restarts before the run fails; -1 for no limit")]


@dataclass(frozen=True)
class Command:
    """What every worker runs.

    Attributes:
        words: arguments of `qlora-train`.
        folder: working directory, which all machines share.
    """

    words: tuple[str, ...]
    folder: str


@dataclass(frozen=True)
class Cluster:
    """What the run asks of Ray.

    Attributes:
        num_workers: a number, or the least and the most.
    """

    num_workers: int | tuple[int, int]
    cpus_per_worker: int
    max_failures: int


def ray_train(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    workers: Workers,
    cpus_per_worker: CpusPerWorker = 1,
    max_failures: MaxFailures = 3,
    offline: Offline = False,
) -> int:
    """Train a config on a Ray cluster, or resume its run; all machines share the working directory."""
    from qlora_train.config import load_run_config

    output_dir = load_run_config(config, overrides or ()).run.output_dir
    assert output_dir is not None, "load_run_config sets it"
    words = ("train", str(config), *(overrides or ()), *(["--offline"] if offline else []), *log_flags())
    cluster = Cluster(_num_workers(workers), cpus_per_worker, max_failures)
    return run_on_ray(Command(words, str(Path.cwd())), Path(output_dir).absolute().parent / ".ray", cluster)


def run_on_ray(command: Command, storage: Path, cluster: Cluster) -> int:
    """Run a command in Ray workers; return the exit status of rank 0.

    Args:
        storage: folder for Ray's own files; Ray checks that all machines share it.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError:
        raise ConfigError("ray: needs the package ray; run: pip install 'qlora-train[ray]'") from None
    ray.init()
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    logger.info("ray: %s workers (%s)", cluster.num_workers, "one GPU each" if use_gpu else "no GPU in the cluster")
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"command": command},
        # of Ray's own processes: NCCL would take GPU memory, and rank 0 merges after the others have ended
        torch_config=TorchConfig(backend="gloo", timeout_s=MAX_WAIT_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": int(use_gpu)},
        ),
        run_config=RunConfig(
            storage_path=str(storage), failure_config=FailureConfig(max_failures=cluster.max_failures)
        ),
    )
    try:
        return int(trainer.fit().return_value)
    except TrainingFailedError as error:
        last = str(error).strip().splitlines()[-1]
        raise TrainingError(
            f"ray: gave up after {cluster.max_failures} restarts ({last}); complete files are intact, and the same command "
            "resumes"
        ) from error


def run_worker(settings: dict[str, Command]) -> int:
    """Run the command of one rank, in a Ray worker; return the exit status of the run.

    Raises:
        RuntimeError: it failed in a way that a restart may mend.
    """
    import torch
    from ray.train.collective import broadcast_from_rank_zero

    port = broadcast_from_rank_zero(free_port())  # Ray's own process group listens at MASTER_PORT
    statuses = [0] * int(os.environ["WORLD_SIZE"])
    torch.distributed.all_gather_object(statuses, run_process(settings["command"], port))
    causes = [status for status in statuses if status != parent_link.LOST_STATUS]
    if not causes or not FINAL_STATUSES.issuperset(causes):
        raise RuntimeError(f"exit statuses of the ranks: {', '.join(map(str, statuses))}")
    return max(causes)


def run_process(command: Command, port: int) -> int:
    """Run a command in a process that ends with this one; return its exit status.

    Args:
        port: where the processes meet; Ray has set rank, world size and address.
    """
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="qlora-train-") as folder:
        environment = os.environ | {
            "MASTER_PORT": str(port), parent_link.PIPE: str(reader),
            parent_link.REPORT: str(Path(folder) / "report.json"),
        }  # fmt: skip
        words = (sys.executable, "-m", "qlora_train.cli.main", *command.words)
        with subprocess.Popen(words, cwd=command.folder, env=environment, pass_fds=[reader]) as process:
            os.close(reader)
            status = process.wait()
    os.close(writer)  # if this process is killed the kernel closes it, and the command ends
    return status


def free_port() -> int:
    """Return a port that no process of this machine listens at."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _num_workers(text: str) -> int | tuple[int, int]:
    numbers = [int(word) if word.isdecimal() else 0 for word in text.split(":")]
    if len(numbers) > 2 or not 0 < numbers[0] <= numbers[-1]:
        raise typer.BadParameter(f"--workers: {text!r} is not a number of processes; give one such as 8, or 2:8")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
