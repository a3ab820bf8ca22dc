"""One process under torchrun, accelerate or mpirun trains as without a launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_train.utils.device import select_device
from qlora_train.utils.errors import ModelError
from qlora_train.utils.launcher import NUM_PROCESSES
from tests.support.runs import adapter_bytes, make_config, train_run

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


@pytest.mark.parametrize("name", NUM_PROCESSES)
def test_one_of_several_processes_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(ModelError, match=rf"one of 2 processes \({name}\)") as caught:
        select_device()
    assert "\n" not in str(caught.value)
    assert f"or unset {name}" in str(caught.value)
