"""One process under torchrun, accelerate or mpirun trains as without a launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_train.runs import RunFolder
from qlora_train.utils.device import select_device
from qlora_train.utils.errors import ModelError
from qlora_train.utils.launcher import Worker, clear_launcher_environment, launched_worker, take_worker
from tests.support.runs import adapter_bytes, losses, make_config, train_run

STEPS = ("train.max_steps=2", "export.merge=false", "quantization.bnb_4bit_compute_dtype=float32")
EACH_BREAKS_THE_TRAINER = {
    "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_TORCH_DEVICE": "meta", "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_FP8_BACKEND": "TE",
    "LOCAL_RANK": "0",
}  # fmt: skip
OTHERS = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "RANK": "0", "WORLD_SIZE": "1",
    "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2",
}  # fmt: skip
TORCHRUN = ("torch.distributed.run", "--nproc_per_node=1", "--standalone")
ACCELERATE = (
    "accelerate.commands.launch",
    "--num_processes=1",
    "--num_machines=1",
    "--mixed_precision=bf16",
    "--dynamo_backend=no",
)


@pytest.fixture(scope="module")
def expected(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return adapter_bytes(train_run(tmp_path_factory.mktemp("alone"), pico_llama, *STEPS))


def test_variables_of_launchers_do_not_change_a_run(
    expected: bytes,
    pico_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    messages: pytest.LogCaptureFixture,
) -> None:
    variables = EACH_BREAKS_THE_TRAINER | OTHERS
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert adapter_bytes(train_run(tmp_path, pico_llama, *STEPS)) == expected
    assert all(name in messages.text for name in variables)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_one_process_of_a_launcher_trains(
    launcher: tuple[str, ...], expected: bytes, pico_llama: Path, tmp_path: Path
) -> None:
    make_config(tmp_path, pico_llama)
    settings = make_config(tmp_path, pico_llama, *STEPS)
    config = tmp_path / "run.yaml"
    config.write_text(settings.model_dump_json())
    command = [sys.executable, "-m", *launcher, "--module", "qlora_train.cli.main", str(config)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "launcher: ignores" in done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == expected


@pytest.mark.slow
def test_two_processes_of_torchrun_train_together(pico_llama: Path, tmp_path: Path) -> None:
    steps = (*STEPS, "train.adam_epsilon=1e-3")  # a smaller one amplifies rounding errors
    alone = train_run(tmp_path, pico_llama, *steps, name="alone")
    settings = make_config(tmp_path, pico_llama, *steps, name="together")
    config = tmp_path / "torchrun.yaml"
    config.write_text(settings.model_dump_json())
    launcher = ("torch.distributed.run", "--nproc_per_node=2", "--standalone")
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "--module", "qlora_train.cli.main", str(config)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: ") == 1
    assert done.stderr.count("training: starts") == 1
    assert losses(RunFolder(tmp_path / "together")) == pytest.approx(losses(alone), rel=1e-5)


SEVERAL = {
    "torchrun": (
        {
            "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "29500",
        },
        Worker(5, 8, 1, 4, "tcp://10.0.0.1:29500"),
    ),
    "an operator of Kubernetes": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "fd00::1", "MASTER_PORT": "23456"},
        Worker(1, 2, 0, 1, "tcp://[fd00::1]:23456"),
    ),
    "srun": (
        {
            "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1234567",
        },
        Worker(3, 4, 1, 2, "tcp://gpu07:24567"),
    ),
    "mpirun": (
        {
            "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
        },
        Worker(1, 2, 1, 2, "tcp://localhost:1"),
    ),
    "torchrun, one agent per machine started by srun": (
        {
            "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu07",
            "MASTER_PORT": "29500", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1234567",
        },
        Worker(5, 8, 1, 4, "tcp://gpu07:29500"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("variables", "worker"), SEVERAL.values(), ids=SEVERAL)
def test_each_launcher_gives_a_process_its_rank(
    variables: dict[str, str], worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert take_worker() == worker
    assert take_worker() is None
    clear_launcher_environment()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[3,5]", "gpu3"), ("n[01-04,09],m", "n01"), ("x-1,y-[2-3]", "x-1")],
)
def test_rank_0_of_a_slurm_step_is_on_its_first_host(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SEVERAL["srun"][0] | {"SLURM_STEP_NODELIST": nodes}).items():
        monkeypatch.setenv(name, value)
    worker = take_worker()
    assert worker is not None
    assert worker.rendezvous.startswith(f"tcp://{first}:")


def test_a_batch_script_without_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    assert launched_worker() is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
        ({"WORLD_SIZE": "2"}, "RANK is '', not a number"),
    ],
)
def test_wrong_variables_are_one_line(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=message) as caught:
        launched_worker()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("launcher", SEVERAL)
def test_what_runs_in_one_process_refuses_to_be_one_of_several(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SEVERAL[launcher][0].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=r"one of \d processes, but this runs in one") as caught:
        select_device()
    assert "\n" not in str(caught.value)
