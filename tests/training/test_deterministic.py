"""`run.deterministic`: on before the model loads, off after the run, bitwise reruns, an error if unsupported."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train import pipeline
from qlora_train.training import padding_free
from qlora_train.training.parity import fused_kernels
from qlora_train.utils.device import DETERMINISTIC_ENVIRONMENT, deterministic_algorithms
from qlora_train.utils.errors import explain, nondeterministic_operation
from tests.support.runs import adapter_bytes, check_in_this_process, stopped_copy, train_run, write_rows

ON = "run.deterministic=true"
REFUSED = (
    "histc_cuda does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'"
)
Settings = tuple[bool, bool, bool, bool, dict[str, str | None]]


def settings() -> Settings:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.cudnn_sdp_enabled(),
        {name: os.environ.get(name) for name in DETERMINISTIC_ENVIRONMENT},
    )


def test_settings_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    before = settings()
    with deterministic_algorithms(False):
        assert settings() == before
    with deterministic_algorithms(True):
        assert settings() == (True, False, False, False, DETERMINISTIC_ENVIRONMENT)
    assert settings() == before


def test_settings_are_on_before_the_model_loads_and_off_after_the_run(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    seen: list[Settings] = []
    load, before = pipeline.load_model, settings()

    def watched(*arguments: Any, **keywords: Any) -> Any:
        seen.append(settings())
        return load(*arguments, **keywords)

    monkeypatch.setattr(pipeline, "load_model", watched)
    run = train_run(tmp_path, pico_llama, ON, "train.max_steps=2")
    assert seen == [(True, False, False, False, DETERMINISTIC_ENVIRONMENT)]
    assert settings() == before
    assert "deterministic algorithms: on (run.deterministic: true)" in messages.text
    again = train_run(tmp_path, pico_llama, "train.max_steps=2", name="again")
    assert seen[1] == before
    assert adapter_bytes(again) == adapter_bytes(run), "no effect on a CPU"


def test_cublas_error_asks_for_a_new_process() -> None:
    error = RuntimeError(
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
        "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses CuBLAS "
        "and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an environment variable "
        "before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or CUBLAS_WORKSPACE_CONFIG=:16:8."
    )
    assert nondeterministic_operation(error) == "cuBLAS"
    assert "start a new process" in str(explain(error))


@pytest.mark.parametrize("module", [fused_kernels, padding_free])
def test_nondeterministic_operation_is_an_error_and_no_parity_result(
    module: Any, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError(REFUSED)

    write_rows(tmp_path / "rows.jsonl", system="add up what the user says, and answer in json with the key sum")
    monkeypatch.setattr(module, "gradients_of", refuse)
    with pytest.raises(RuntimeError) as caught:
        train_run(tmp_path, pico_llama, ON)
    line = explain(caught.value)
    assert line is not None
    assert line.startswith(
        "run.deterministic: true, but histc_cuda has no deterministic algorithm on this device; set it to"
    )
    monkeypatch.undo()
    assert train_run(tmp_path, pico_llama, "run.allow_changed=[run.deterministic]").is_finished()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [(), ("data.packing=true",), ("lora.lora_dropout=0.1",)])
def test_runs_on_a_gpu_repeat_and_resume_bitwise(
    options: tuple[str, ...], pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_in_this_process(monkeypatch)
    asked = (ON, "train.save_steps=2", "train.max_steps=6", *options)
    first = train_run(tmp_path, pico_llama, *asked, name="first")
    assert adapter_bytes(train_run(tmp_path, pico_llama, *asked, name="second")) == adapter_bytes(first)
    stopped_copy(first, tmp_path / "stopped")
    assert adapter_bytes(train_run(tmp_path, pico_llama, *asked, name="stopped")) == adapter_bytes(first)
