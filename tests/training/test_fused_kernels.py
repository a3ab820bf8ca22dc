"""Fused kernels in a model and a run: what they skip, when they are off, and that results match the reference."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from qlora_train.adapters import AdaptedModel
from qlora_train.kernels import shared_input
from qlora_train.kernels.install import FusedKernels, install
from qlora_train.objectives.label_losses import label_losses
from qlora_train.training.memory.dequantized_cache import fill_cache
from qlora_train.training.parity.gradients import compare_gradients, gradients_of
from qlora_train.utils.errors import CheckpointError
from tests.support.runs import adapted_model, adapter_bytes, stopped_copy, train_run

Pico = Callable[..., Path]
EXACT = "quantization.bnb_4bit_compute_dtype=float32"
SETTINGS = (EXACT, "train.max_steps=3", "train.save_steps=1")
IDS = torch.arange(60).reshape(3, 20) * 5 % 300 + 4
BATCH: dict[str, Any] = {"input_ids": IDS, "labels": IDS}


def install_fused_kernels(model: AdaptedModel) -> FusedKernels:
    return install(model.model, lambda: label_losses(model.model, **BATCH))


def test_layers_that_read_the_same_input_are_one_group(pico_llama: Path, tmp_path: Path) -> None:
    fast = install_fused_kernels(adapted_model(tmp_path, pico_llama))
    layers, pairs = 2, "groups of them that read the same input"
    assert fast.counts == {
        "adapted linear layers": 7 * layers, pairs: 2 * layers, "gated MLPs": layers, "RMS norms": 2 * layers + 1,
        "rotary embeddings": layers,
    }  # fmt: skip
    assert not fast.skipped


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "gpt2", "mixtral"])
def test_evaluation_and_disabled_adapters_use_the_reference(model_type: str, pico: Pico, tmp_path: Path) -> None:
    model = adapted_model(tmp_path, pico(model_type))

    def logits() -> list[torch.Tensor]:
        found = []
        with torch.no_grad():
            found.append(model.model(input_ids=IDS, use_cache=False).logits)
            found.append(model.model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False))
        with model.model.disable_adapter():
            found.append(model.model(input_ids=IDS, use_cache=False).logits.detach())
        return found

    expected = logits()
    install_fused_kernels(model)
    for before, after in zip(expected, logits(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0 if before.dtype == torch.long else 5e-6)


def test_adapter_files_are_equal_with_and_without_fused_kernels(pico_llama: Path, tmp_path: Path) -> None:
    model = adapted_model(tmp_path, pico_llama)
    model.model.save_pretrained(tmp_path / "plain")
    install_fused_kernels(model)
    model.model.save_pretrained(tmp_path / "fast")
    plain, fast = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "fast"))
    assert plain == fast


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("lora.use_dora=true", "DoRA"), ("lora.bias=all", "a custom forward")],
)
def test_unsupported_layers_are_left_to_peft(setting: str, reason: str, pico: Pico, tmp_path: Path) -> None:
    model = adapted_model(tmp_path, pico("qwen2"), setting)
    expected = gradients_of(model, BATCH)
    fast = install_fused_kernels(model)
    assert fast.skipped[reason] > 0
    assert compare_gradients(expected, gradients_of(model, BATCH)).gradient < 1e-5


@pytest.mark.parametrize("settings", [(), ("quantization.load_in_4bit=false",), ("lora.use_rslora=true",)])
def test_checkpointed_layers_have_the_same_gradients(
    settings: tuple[str, ...], pico_llama: Path, tmp_path: Path
) -> None:
    model = adapted_model(tmp_path, pico_llama, *settings)
    expected = gradients_of(model, BATCH)
    install_fused_kernels(model)
    model.model.enable_input_require_grads()
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert compare_gradients(expected, gradients_of(model, BATCH)).gradient < 1e-5


def test_recomputation_skips_the_last_product(pico_llama: Path, tmp_path: Path) -> None:
    model = adapted_model(tmp_path, pico_llama)
    fast = install_fused_kernels(model)
    reads: Counter[str] = Counter()
    names = {
        layer.get_base_layer(): name for name, layer in model.model.named_modules() if isinstance(layer, LoraLayer)
    }
    for weight in fast.weights:
        weight.read = lambda own=weight.read, name=names[weight._layer]: (reads.update([name]), own())[1]  # type: ignore
    model.model.enable_input_require_grads()
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gradients_of(model, BATCH)
    times = {name.rpartition(".")[2]: count for name, count in reads.items()}
    assert times == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 3),
        "down_proj": 2,
    }


def test_layer_of_a_group_may_have_another_input(pico_llama: Path, tmp_path: Path) -> None:
    model = adapted_model(tmp_path, pico_llama)
    attention = model.model.get_base_model().model.layers[0].self_attn
    x, other = torch.randn(1, 5, 64, requires_grad=True), torch.randn(1, 5, 64)
    expected = [attention.q_proj(x), attention.k_proj(other), attention.v_proj(x), attention.v_proj(2 * x)]
    install_fused_kernels(model)
    changed = x.detach().clone().requires_grad_()
    found = [attention.q_proj(changed), attention.k_proj(other), attention.v_proj(changed)]
    with torch.no_grad():
        changed.mul_(2)  # same tensor, other values
    found.append(attention.v_proj(changed))
    for before, after in zip(expected, found, strict=True):
        torch.testing.assert_close(after, before)


def test_cached_weights_have_the_same_values(pico_llama: Path, tmp_path: Path, messages: Any) -> None:
    model = adapted_model(tmp_path, pico_llama)
    fast = install_fused_kernels(model)
    expected = gradients_of(model, BATCH)
    one = fast.weights[0].dequantized_bytes
    fill_cache(fast.weights, 3.5 * one / 1e9, torch.device("cpu"))
    assert 0 < sum(weight.cached is not None for weight in fast.weights) < len(fast.weights)
    assert sum(weight.cached.nbytes for weight in fast.weights if weight.cached is not None) <= 3.5 * one
    fill_cache(fast.weights, "auto", torch.device("cpu"))
    assert all(weight.cached is not None for weight in fast.weights)
    assert compare_gradients(expected, gradients_of(model, BATCH)).gradient == 0
    assert "dequantized cache: 14 of 14 weights" in messages.text


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_run_with_fused_kernels_trains_like_the_reference(pico_llama: Path, tmp_path: Path, messages: Any) -> None:
    fast = train_run(tmp_path, pico_llama, *SETTINGS, name="fast")
    assert "fused kernels: 14 adapted linear layers, 4 groups" in messages.text
    parity = json.loads(fast.fused_kernels_file.read_text())
    assert parity["passed"]
    assert parity["gradient"] < 1e-5
    plain = train_run(tmp_path, pico_llama, *SETTINGS, "train.fused_kernels=false", name="plain")
    assert not plain.fused_kernels_file.exists()
    lines = [
        [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()] for run in (fast, plain)
    ]
    for one, other in zip(*lines, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-4)
    assert adapter_bytes(fast) != adapter_bytes(plain)


def test_dequantized_cache_changes_no_bit_of_a_run(pico_llama: Path, tmp_path: Path) -> None:
    kept = train_run(tmp_path, pico_llama, *SETTINGS, name="kept")
    none = train_run(tmp_path, pico_llama, *SETTINGS, "train.dequantized_cache_gb=0", name="none")
    assert adapter_bytes(kept) == adapter_bytes(none)


@pytest.mark.parametrize("fault", ["wrong", "failing"])
def test_run_keeps_the_reference_if_the_parity_check_fails(
    fault: str, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: Any
) -> None:
    right = shared_input.lora_linears

    def wrong(x: Any, layers: Any) -> Any:
        if fault == "failing":
            raise RuntimeError("no kernel for this")
        return right(x, replace(layers, scales=[2 * scale for scale in layers.scales]))

    plain = train_run(tmp_path, pico_llama, *SETTINGS, "train.fused_kernels=false", name="plain")
    monkeypatch.setattr(shared_input, "lora_linears", wrong)
    run = train_run(tmp_path, pico_llama, *SETTINGS, name="wrong")
    assert adapter_bytes(run) == adapter_bytes(plain)
    problem = "it differs on this model (loss by" if fault == "wrong" else "it fails on this model (no kernel for this)"
    assert f"fused kernels: off ({problem}" in messages.text


def test_resumed_run_keeps_its_parity_result(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = shared_input.lora_linears
    monkeypatch.setattr(shared_input, "lora_linears", lambda *arguments: [2 * each for each in right(*arguments)])
    straight = train_run(tmp_path, pico_llama, *SETTINGS, name="straight")
    assert not json.loads(straight.fused_kernels_file.read_text())["passed"]
    monkeypatch.undo()
    stopped_copy(straight, tmp_path / "stopped")
    assert adapter_bytes(train_run(tmp_path, pico_llama, *SETTINGS, name="stopped")) == adapter_bytes(straight)


def test_damaged_parity_result_is_an_error(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico_llama, *SETTINGS, name="run")
    shutil.rmtree(run.adapter)
    run.fused_kernels_file.write_text('{"passed": true, "colour": "red"}')
    with pytest.raises(
        CheckpointError, match=r"fused_kernels\.json: is not as it was written; restore it, or delete it"
    ):
        train_run(tmp_path, pico_llama, *SETTINGS, name="run")
