"""Device selection, its log line, and errors for unusable GPUs. No GPU is needed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_train.cli.main import main
from qlora_train.runs import RunFolder
from qlora_train.training.trl_arguments import sft_config
from qlora_train.utils import device, nvidia_driver
from qlora_train.utils.device import prepare_cuda, select_device
from qlora_train.utils.errors import ModelError, explain
from tests.support.runs import make_config

MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build\nGCC version: 12\n"
FAKE_DRIVER = """
#include <stdlib.h>
int cuInit(unsigned flags) { return atoi(getenv("FAKE_STATUS")); }
int cuDriverGetVersion(int *version) { *version = atoi(getenv("FAKE_VERSION")); return 0; }
int cuGetErrorName(int status, const char **name) { *name = "CUDA_ERROR_SYSTEM_NOT_READY"; return 0; }
"""
SUCCESS, NO_DEVICE, NOT_READY = "0", "100", "802"


@pytest.fixture(scope="module")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(FAKE_DRIVER)
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "driver.c"], check=True)
    return library


@pytest.fixture
def driver(fake_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Driver 535 with CUDA 12.2 and a GPU that torch does not find."""
    (tmp_path / "version").write_text(MODULE)
    monkeypatch.setattr(nvidia_driver, "VERSION_FILE", tmp_path / "version")
    monkeypatch.setattr(nvidia_driver, "LIBRARY", str(fake_library))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("FAKE_STATUS", SUCCESS)
    monkeypatch.setenv("FAKE_VERSION", "12020")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device._log_once.cache_clear()
    return monkeypatch


def refusal() -> str:
    with pytest.raises(ModelError) as caught:
        select_device()
    assert str(caught.value).endswith(", or set CUDA_VISIBLE_DEVICES= to train on the CPU")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_old_driver_is_one_line_with_the_required_version(driver: pytest.MonkeyPatch) -> None:
    assert re.match(
        r"GPU: the NVIDIA driver 535\.104\.05 has CUDA 12\.2 and torch \S+ needs CUDA 13\.0; install driver 580 or newer, "
        r"or torch for CUDA 12 \(https://pytorch\.org/\S+\)", refusal(),
    )  # fmt: skip
    driver.setenv("FAKE_VERSION", "13010")
    assert "does not find the GPU of the NVIDIA driver 535.104.05" in refusal()


def test_torch_without_cuda_on_a_gpu_machine_is_one_line(driver: pytest.MonkeyPatch) -> None:
    driver.setattr(torch.version, "cuda", None)
    assert "is built without CUDA and the NVIDIA driver 535.104.05 has a GPU; install a CUDA build" in refusal()


def test_failing_driver_is_one_line_with_its_error(driver: pytest.MonkeyPatch) -> None:
    driver.setenv("FAKE_STATUS", NOT_READY)
    assert "the NVIDIA driver 535.104.05 fails (CUDA_ERROR_SYSTEM_NOT_READY); see nvidia-smi" in refusal()


@pytest.mark.parametrize("library", ["its own", "missing"])
@pytest.mark.parametrize("visible", ["7", "GPU-12ab", None])
def test_invisible_gpus_are_one_line(library: str, visible: str | None, driver: pytest.MonkeyPatch) -> None:
    """A wrong CUDA_VISIBLE_DEVICES, or a container started without GPUs."""
    driver.setenv("FAKE_STATUS", NO_DEVICE)
    if library == "missing":
        driver.setattr(nvidia_driver, "LIBRARY", "libcuda.so.none")
    if visible:
        driver.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "sees no GPU; start the container with --gpus all, request a GPU" in refusal()
    assert f"correct CUDA_VISIBLE_DEVICES ({visible or 'not set'}), or" in refusal()
    driver.setattr(torch.version, "cuda", None)
    assert select_device().type == "cpu"


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_select_the_cpu(
    visible: str, driver: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    driver.setenv("CUDA_VISIBLE_DEVICES", visible)
    prepare_cuda()
    driver.setattr(torch, "get_num_threads", lambda: 2)
    assert {select_device().type for _ in range(3)} == {"cpu"}
    wanted = "device: CPU, 2 threads (CUDA_VISIBLE_DEVICES hides all GPUs)"
    assert messages.messages == [wanted]


def test_a_machine_without_a_driver_trains_on_the_cpu(
    driver: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    driver.setattr(nvidia_driver, "VERSION_FILE", Path("/nonexistent"))
    driver.setattr(torch, "get_num_threads", lambda: 1)
    assert select_device().type == "cpu"
    assert messages.messages == ["device: CPU, 1 thread (no CUDA GPU found)"]


def test_command_line_refuses_the_cpu_on_a_gpu_machine(
    driver: pytest.MonkeyPatch, pico_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config(tmp_path, pico_llama)
    assert (
        main(["train", str(tmp_path / "run.yaml"), f"model.model_name_or_path={pico_llama}", "data.train=no.jsonl"])
        == 2
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the NVIDIA driver 535.104.05 has CUDA 12.2" in last


# --- a GPU that torch has ---------------------------------------------------------------------------------------------


@pytest.fixture
def h200(driver: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Two H200 as torch reports them."""
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=150_039_945_216, major=9, minor=0)
    driver.setattr(torch.cuda, "is_available", lambda: True)
    driver.setattr(torch.cuda, "device_count", lambda: 2)
    driver.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    driver.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "sm_120", "compute_120"])
    return driver


def test_the_gpu_is_logged_once_with_memory_architecture_and_driver(
    h200: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    assert {select_device() for _ in range(3)} == {torch.device("cuda", 0)}
    assert messages.messages == ["device: NVIDIA H200, 139.7 GiB, sm_90, driver 535.104.05"]


def test_gpu_without_kernels_is_one_line(h200: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="Tesla V100", total_memory=2**34, major=7, minor=0)
    h200.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert re.match(
        r"GPU: Tesla V100 has compute capability 7\.0,.* has kernels for 7\.5 to 12\.0; install torch for an older",
        refusal(),
    )
    gpu = SimpleNamespace(name="RTX 5090", total_memory=2**34, major=12, minor=0)
    h200.setattr(torch.cuda, "get_arch_list", lambda: ["sm_50", "sm_75", "sm_80", "sm_86", "sm_90"])
    assert re.match(
        r"GPU: RTX 5090 has compute capability 12\.0,.* has kernels for 5\.0 to 9\.0; install torch for a newer",
        refusal(),
    )


@pytest.mark.parametrize(("major", "minor"), [(8, 9), (12, 1), (13, 0)])
def test_kernels_of_the_same_major_version_or_ptx_suffice(major: int, minor: int, h200: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="GPU", total_memory=2**34, major=major, minor=minor)
    h200.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    h200.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"])
    assert select_device().type == "cuda"


def test_cuda_that_cannot_be_initialised_is_one_line(h200: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable.\nCUDA kernel errors might be")

    h200.setattr(torch.cuda, "get_device_properties", fail)
    assert refusal().startswith("GPU: CUDA fails: CUDA-capable device(s) is/are busy or unavailable; see nvidia-smi")


def test_a_gpu_in_exclusive_mode_is_one_line() -> None:
    """Saved models are verified by a second process."""
    text = "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be"
    line = explain(RuntimeError(text))
    assert line is not None
    assert "\n" not in line
    assert line.endswith("see nvidia-smi, use compute mode Default")


@pytest.mark.parametrize(
    ("visible", "shown"),
    [(None, "0"), ("5, 6", "5"), ("GPU-1f,GPU-2e", "GPU-1f"), ("MIG-3a/1/0", "MIG-3a/1/0"), ("", ""), ("-1", "-1")],
)
def test_cuda_sees_one_gpu_by_number_or_uuid(visible: str | None, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    prepare_cuda()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown


def test_one_gpu_is_chosen_before_anything_can_initialise_cuda() -> None:
    """Without NVML `device_count` initialises CUDA, as `is_available` does; the driver reads the variable only then."""
    code = """
import os, torch
def initialises(*_):
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == "0", "CUDA is initialised before one GPU is chosen"
    return 0
torch.cuda.device_count = initialises
torch.cuda.is_available = lambda: bool(initialises())
from qlora_train.cli import libraries
libraries.prepare_libraries()
import bitsandbytes
"""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_trainer_uses_one_of_several_visible_gpus(
    h200: pytest.MonkeyPatch, pico_llama: Path, tmp_path: Path
) -> None:
    """In a notebook CUDA may already be initialised; TRL refuses several GPUs."""
    h200.setattr(torch.cuda, "set_device", lambda _: None)
    adapted: Any = SimpleNamespace(loaded=SimpleNamespace(device=torch.device("cuda", 0), compute_dtype=torch.float32))
    settings = make_config(tmp_path, pico_llama, "train.optim=adamw_torch")
    arguments = sft_config(settings, adapted, RunFolder(tmp_path / "run"), checkpoints_all=False)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, settings.train.per_device_train_batch_size)


TWO_GPUS = """
import bitsandbytes, torch, transformers
from types import SimpleNamespace
# CUDA is in use, as it is once bitsandbytes has been imported on a machine with GPUs; their memory is the host's
torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_properties = lambda _: SimpleNamespace(name="H200", total_memory=2**37, major=9, minor=0)
torch.cuda.get_device_name = lambda _: "H200"
torch.cuda.get_arch_list = lambda: ["sm_90"]
torch.cuda.is_bf16_supported = lambda **_: True
torch.version.cuda = "13.0"
original = transformers.PreTrainedModel.from_pretrained.__func__
def on_the_host(cls, *arguments, device_map, **named):
    assert device_map == {"": torch.device("cuda", 0)}
    return original(cls, *arguments, device_map={"": "cpu"}, **named)
transformers.PreTrainedModel.from_pretrained = classmethod(on_the_host)
"""


def test_the_python_example_of_the_tour_loads_a_model_beside_a_second_gpu(pico_llama: Path, tmp_path: Path) -> None:
    tour = (Path(__file__).parents[2] / "docs" / "index.md").read_text(encoding="utf-8")
    example = tour.split("## From Python\n")[1].split("```python\n")[1].split("```")[0]
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{model_name_or_path: {pico_llama}}}\ndata: {{train: rows.jsonl}}\n")
    assert '"configs/demo.yaml"' in example
    code = TWO_GPUS + example.replace("configs/demo.yaml", str(config)) + "\nassert str(loaded.device) == 'cuda:0'"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_gpu_is_logged(messages: pytest.LogCaptureFixture) -> None:
    device._log_once.cache_clear()
    assert select_device() == torch.device("cuda", 0)
    name = re.escape(torch.cuda.get_device_name(0))
    assert re.search(rf"device: {name}, [0-9.]+ GiB, sm_\d+(, driver \d+\.\d+\S*)?", messages.text)
