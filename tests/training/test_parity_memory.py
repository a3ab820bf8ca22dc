"""Memory of parity checks: that of a checkpointed step; out of memory is never a result."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from qlora_train.adapters import AdaptedModel
from qlora_train.kernels import function_overrides, fused_mlp
from qlora_train.kernels.install import install
from qlora_train.kernels.ops import rms_norm
from qlora_train.kernels.packed import varlen
from qlora_train.objectives.label_losses import label_losses
from qlora_train.training import padding_free
from qlora_train.training.parity import fused_kernels
from qlora_train.training.parity.gradients import TOLERANCES, gradients_of
from qlora_train.training.parity.parity_check import check_parity
from qlora_train.utils.errors import TrainingError
from tests.support.live_bytes import LiveBytes
from tests.support.runs import adapted_model, train_run

Pico = Callable[..., Path]
SETTINGS = (
    "quantization.bnb_4bit_compute_dtype=float32", "train.max_steps=2", "train.per_device_train_batch_size=4",
)  # fmt: skip
IDS = torch.arange(40).view(2, 20)
BATCH = {"input_ids": IDS, "labels": IDS}


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


CHECKS = {"fused kernels": fused_kernels, "padding-free": padding_free}


@contextmanager
def out_of_memory_from(num_tokens: int, check: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let the parity check run out of memory on that many tokens or more; yield the sizes."""
    tried: list[int] = []

    def limited(adapted: AdaptedModel, batch: dict[str, Any]) -> Any:
        def count(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            tried.append(arguments[0].numel())
            if tried[-1] >= num_tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        handle = adapted.loaded.model.get_input_embeddings().register_forward_pre_hook(count)
        try:
            return gradients_of(adapted, batch)
        finally:
            handle.remove()

    with monkeypatch.context() as patch:
        patch.setattr(CHECKS[check], "gradients_of", limited)
        yield tried


@pytest.mark.parametrize("check", CHECKS)
def test_parity_check_out_of_memory_is_retried_on_fewer_rows(
    check: str, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: Any
) -> None:
    with out_of_memory_from(140, check, monkeypatch) as tried:
        run = train_run(tmp_path, pico_llama, *SETTINGS)
    assert tried[0] >= 140 > tried[-1]
    for file in (run.fused_kernels_file, run.padding_free_file):
        assert json.loads(file.read_text())["passed"]
    assert f"{check}: parity check on" in messages.text
    assert "please report" not in messages.text


@pytest.mark.parametrize("check", CHECKS)
def test_parity_check_out_of_memory_is_no_result(
    check: str, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with out_of_memory_from(0, check, monkeypatch), pytest.raises(TrainingError, match=f"{check}: out of memory"):
        train_run(tmp_path, pico_llama, *SETTINGS)
    later = train_run(tmp_path, pico_llama, *SETTINGS)
    for file in (later.fused_kernels_file, later.padding_free_file):
        assert json.loads(file.read_text())["passed"]


def saved_bytes(adapted: AdaptedModel, check: Callable[[], Any]) -> int:
    """Return the bytes that autograd saves outside of checkpointed layers, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in adapted.model.parameters()}
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            sizes.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        check()
    return sum(sizes)


@pytest.mark.parametrize(("owner", "name"), [(fused_mlp.GatedMlp, "_gate_and_up"), (rms_norm.nn.Module, "__call__")])
def test_out_of_memory_skips_no_fused_operation(
    owner: Any, name: str, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted_model(tmp_path, pico_llama)

    def run() -> None:
        label_losses(model.model, **BATCH)
        monkeypatch.setattr(owner, name, out_of_memory)

    with pytest.raises(torch.OutOfMemoryError):
        install(model.model, run)
    with pytest.raises(torch.OutOfMemoryError):
        function_overrides._match(torch.cos, out_of_memory, (torch.ones(1),), {})


def test_out_of_memory_is_no_result_of_the_varlen_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_trial", out_of_memory)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            varlen.works_on(torch.device("cuda", 7))


def test_parity_check_saves_only_the_input_of_each_layer(pico: Pico, tmp_path: Path) -> None:
    """Reference and fused kernels each save one hidden state per layer."""
    ids = torch.arange(120).reshape(2, 60) % 300 + 4
    batch = {"input_ids": ids, "labels": ids}
    found = {}

    def check(adapted: AdaptedModel) -> None:
        tolerances = TOLERANCES[torch.float32]
        result = check_parity(
            "a check", adapted, "run", [(2, 60)], lambda *_: fused_kernels.both_gradients(adapted, batch), tolerances
        )
        assert result.passed

    for num_layers in (2, 6):
        adapted = adapted_model(tmp_path / str(num_layers), pico("llama", num_hidden_layers=num_layers))
        found[num_layers] = saved_bytes(adapted, lambda adapted=adapted: check(adapted))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in adapted.model.modules())
    hidden_bytes = ids.numel() * adapted.loaded.model.config.hidden_size * 4
    assert found[6] - found[2] <= 2 * 4 * hidden_bytes


def test_watching_a_model_keeps_no_inputs_alive(pico: Pico, tmp_path: Path) -> None:
    """`install` watches every layer to find what it can replace; inputs are freed as usual."""
    ids = torch.arange(120).reshape(2, 60) % 300 + 4
    peaks = []
    for num_layers in (2, 6):
        adapted = adapted_model(tmp_path / str(num_layers), pico("llama", num_hidden_layers=num_layers))
        with LiveBytes() as live:
            install(adapted.model, lambda adapted=adapted: label_losses(adapted.model, input_ids=ids, labels=ids))
        peaks.append(live.peak - live.live)
    assert peaks[1] <= 1.1 * peaks[0]
