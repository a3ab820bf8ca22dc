"""Runs that torchrun and Slurm start: on two machines, signalled before a time limit, resumed."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_train.runs import RunFolder
from tests.support.launched import SETTINGS, LaunchedRun, adapter_distance, output, start, write_run
from tests.support.runs import train_run

ROOT = Path(__file__).resolve().parents[2]
PEER_SECONDS = 30
SRUN = """#!/bin/bash
# two tasks on one machine; the status of a job step is the highest of its tasks
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2
shift
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do
    wait "$task"
    ended=$?
    if [ $ended -gt "${status:-0}" ]; then status=$ended; fi
done
exit "${status:-0}"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""
CLI = f"""#!/bin/bash
exec {sys.executable} -m qlora_train.cli.main "$@"
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run of one process."""
    return train_run(tmp_path_factory.mktemp("unbroken"), pico_llama, *SETTINGS, "train.save_steps=100")


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a batch job, with commands that stand in for Slurm's."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "qlora-train": CLI}.items():
        (commands / name).write_text(text, encoding="utf-8")
        (commands / name).chmod(0o755)
    return {
        "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": str(40_000 + free_port()), "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "node1", "REQUEUED": str(tmp_path / "requeued"),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_slurm_job_is_requeued_before_its_time_limit(
    pico_llama: Path, tmp_path: Path, slurm: dict[str, str], unbroken: RunFolder
) -> None:
    run = write_run(tmp_path, pico_llama)
    job = ("bash", str(ROOT / "recipes" / "cluster" / "slurm.sh"), str(run.config))
    first = start(*job, **slurm)
    run.wait_for_step(4, first)
    for process in run.processes().values():
        process.send_signal(signal.SIGUSR1)  # as --signal=USR1 does
    log = output(first)
    assert first.returncode == 75, log
    requeued = Path(slurm["REQUEUED"])
    assert requeued.read_text(encoding="utf-8") == f"requeue {slurm['SLURM_JOB_ID']}\n"
    assert not run.processes()
    second = start(*job, **slurm)
    log = output(second)
    assert second.returncode == 0, log
    assert log.count("training: resumes from") == 1
    assert requeued.read_text(encoding="utf-8").count("requeue") == 1
    assert adapter_distance(run.folder, unbroken) <= 1e-4


def test_two_torchrun_agents_train_and_resume(pico_llama: Path, tmp_path: Path, unbroken: RunFolder) -> None:
    run = write_run(tmp_path, pico_llama)
    first, second = start_agents(run)
    run.wait_for_step(4, first)
    run.processes()[1].kill()
    logs = [agent.communicate(timeout=PEER_SECONDS)[0] for agent in (first, second)]
    assert first.returncode != 0, logs
    assert second.returncode != 0, logs
    assert not run.processes()
    agents = start_agents(run)
    logs = [output(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], logs
    assert logs[0].count("training: resumes from") == 1
    assert "training: resumes from" not in logs[1], "only rank 0 logs"
    assert adapter_distance(run.folder, unbroken) <= 1e-4


def start_agents(run: LaunchedRun) -> list[subprocess.Popen[str]]:
    """Start a torchrun agent for each of two machines, both this one."""
    port = free_port()
    options = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}")
    return [
        start(
            sys.executable, "-m", "torch.distributed.run", *options, f"--node-rank={rank}",
            "-m", "qlora_train.cli.main", str(run.config),
        )
        for rank in (0, 1)
    ]  # fmt: skip
