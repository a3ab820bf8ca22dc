"""`train.optim: auto`: chosen by the state's share of GPU memory, kept by resumed runs, paged after a resume."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from qlora_train.adapters import AdaptedModel, attach_adapter
from qlora_train.config import LoraSection
from qlora_train.models import load_model
from qlora_train.planning.held_memory import optimizer_bytes
from qlora_train.planning.held_memory import trained_tensors as planned_tensors
from qlora_train.planning.memory import step_settings
from qlora_train.planning.run_plan import model_shapes
from qlora_train.runs.training_state import save_tree
from qlora_train.training.optimizer import choose_optimizer, page_restored_state, trained_tensors
from tests.support.fake_cuda import IS_FAKE
from tests.support.llama_2 import LLAMA_2_7B
from tests.support.runs import make_config


@pytest.fixture
def on_gpu(pico_llama: Path, tmp_path: Path) -> AdaptedModel:
    """An adapted model that claims to be on a GPU; its AdamW state in float32 is 8 bytes per parameter."""
    config = make_config(tmp_path, pico_llama)
    adapted = attach_adapter(load_model(config.model, config.quantization), config.lora, seed=0)
    return replace(adapted, loaded=replace(adapted.loaded, device=torch.device("cuda", 0)))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("qlora_train"), "propagate", True)
    caplog.set_level("DEBUG", logger="qlora_train")
    return caplog


def with_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=num_bytes))


@pytest.mark.parametrize(
    ("share", "name"), [(0.0199, "adamw_torch_fused"), (0.02, "adamw_torch_fused"), (0.0201, "paged_adamw_8bit")]
)
def test_small_state_stays_on_the_gpu(
    share: float, name: str, on_gpu: AdaptedModel, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    state_bytes = 8 * sum(tensor.numel for tensor in trained_tensors(on_gpu))
    with_memory(monkeypatch, int(state_bytes / share))
    assert choose_optimizer("auto", on_gpu) == name
    side = "at most" if name == "adamw_torch_fused" else "more than"
    [message] = said.messages
    assert message.startswith(f"optimizer: {name} (float32 state of ")
    assert f"is {side} 2% of the GPU's" in message


def test_named_optimizers_are_used(on_gpu: AdaptedModel, said: pytest.LogCaptureFixture) -> None:
    for name in ("paged_adamw_8bit", "adamw_8bit", "adamw_torch_fused", "sgd"):
        assert choose_optimizer(name, on_gpu) == name
    assert not said.messages


@pytest.mark.parametrize("name", ["adamw_torch_fused", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_resumed_run_keeps_its_optimizer_on_another_gpu(
    name: str, on_gpu: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    made = {"adamw_torch_fused": torch.optim.AdamW, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}[name]([weight])
    weight.grad = torch.ones_like(weight)
    made.step()
    save_tree(tmp_path, "optimizer", made.state_dict())
    for num_bytes in (1, 10**15):
        with_memory(monkeypatch, num_bytes)
        assert choose_optimizer("auto", on_gpu, tmp_path) == name
    assert said.messages == [f"optimizer: {name} (as in {tmp_path.name})"] * 2


@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_restored_state_of_a_paged_optimizer_is_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.ones(64, 128))
    first, second = (bnb.optim.PagedAdamW8bit([weight]) for _ in range(2))
    weight.grad = torch.randn_like(weight)
    first.step()
    second.load_state_dict(first.state_dict())
    pages: list[torch.Tensor] = []

    def get_state_buffer(parameter: Any, dtype: torch.dtype) -> torch.Tensor:
        pages.append(torch.zeros_like(parameter, dtype=dtype))
        return pages[-1]

    monkeypatch.setattr(second, "get_state_buffer", get_state_buffer)
    page_restored_state(SimpleNamespace(optimizer=second))
    state = second.state[weight]
    assert {id(state["state1"]), id(state["state2"])} == set(map(id, pages))
    for key in ("state1", "state2"):
        assert torch.equal(state[key], first.state[weight][key])


@pytest.mark.parametrize(
    ("gpu_bytes", "name", "state_bytes"),
    [(24 * 10**9, "adamw_torch_fused", 319_815_680), (6 * 10**9, "paged_adamw_8bit", 81_205_248)],
)
def test_memory_plan_counts_the_optimizer_of_the_gpu(gpu_bytes: int, name: str, state_bytes: int) -> None:
    model = model_shapes(LLAMA_2_7B, LoraSection())
    settings = step_settings(model, r=16, num_tokens=512, gpu_bytes=gpu_bytes)
    assert settings.optimizer == name
    assert optimizer_bytes(name, planned_tensors(model, settings)) == state_bytes


@pytest.mark.gpu
@pytest.mark.skipif(IS_FAKE or not torch.cuda.is_available(), reason="needs a CUDA device and bitsandbytes' pages")
def test_restored_state_is_paged_on_a_gpu() -> None:
    weight = torch.nn.Parameter(torch.ones(512, 512, device="cuda"))
    first, second = (bnb.optim.PagedAdamW8bit([weight]) for _ in range(2))
    weight.grad = torch.randn_like(weight)
    first.step()
    second.load_state_dict(first.state_dict())
    page_restored_state(second)
    assert second.state[weight]["state1"].is_paged
    second.step()
    torch.cuda.synchronize()
