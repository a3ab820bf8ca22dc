"""LoRA dropout in fused kernels: equal to PEFT with the same masks, bitwise equal at every checkpointing level."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qlora_train.adapters import AdaptedModel
from qlora_train.config import LoraSection
from qlora_train.kernels import tiled
from qlora_train.kernels.checkpointing_levels import LEVELS
from qlora_train.kernels.install import FusedKernels, install
from qlora_train.kernels.lora_dropout import lora_dropout_off
from qlora_train.kernels.lora_linear import LoraLayers
from qlora_train.objectives.label_losses import label_losses
from qlora_train.planning.activations import Computation, MicroBatch
from qlora_train.planning.activations import saved_bytes as planned_bytes
from qlora_train.planning.run_plan import model_shapes
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing, saved_bytes
from qlora_train.training.parity import gradients
from qlora_train.training.parity.gradients import compare_gradients, gradients_of
from tests.support.runs import adapted_model, adapter_bytes, losses, stopped_copy, train_run

Pico = Callable[..., Path]
RATE = 0.25
DROPOUT = f"lora.lora_dropout={RATE}"
IDS = torch.arange(60).reshape(3, 20) * 5 % 300 + 4
BATCH: dict[str, Any] = {"input_ids": IDS, "labels": IDS}
FAMILIES = ("llama", "gemma2", "qwen2", "phi3", "glm4", "gpt_neox")


class Masked(nn.Module):
    """LoRA dropout with a given mask, (rows, features)."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self._mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self._mask.view(x.shape) / (1 - RATE)


def install_fused_kernels(model: AdaptedModel) -> FusedKernels:
    return install(model.model, lambda: label_losses(model.model, **BATCH))


def drawn_masks(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Tensor]:
    """Return the mask of each base layer, filled while masks are drawn; a second draw must be equal."""
    masks: dict[Any, Tensor] = {}
    draw = LoraLayers.draw_mask

    def noting(self: LoraLayers, rows: Tensor) -> Tensor | None:
        mask = draw(self, rows)
        assert mask is not None
        for weight in self.weights:
            assert torch.equal(masks.setdefault(weight._layer, mask), mask)
        return mask

    monkeypatch.setattr(LoraLayers, "draw_mask", noting)
    return masks


@pytest.fixture(autouse=True)
def _with_dropout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep dropout on in `gradients_of`, which disables it for parity checks."""
    if "run" not in request.function.__name__:
        monkeypatch.setattr(gradients, "lora_dropout_off", lambda _: nullcontext())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_loss_and_gradients_match_peft_with_the_same_masks(
    model_type: str, level: Any, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted_model(tmp_path, pico(model_type), DROPOUT)
    fast = install_fused_kernels(model)
    assert not fast.skipped
    layers = LayerCheckpointing(model.model, fast.mlps)
    if not layers.supports(level):
        pytest.skip("no fused MLP")
    layers.set(level)
    masks = drawn_masks(monkeypatch)
    found = gradients_of(model, BATCH)
    fast.uninstall()
    layers.set("none")
    for layer in (module for module in model.model.modules() if isinstance(module, LoraLayer)):
        layer.lora_dropout["default"] = Masked(masks.pop(layer.get_base_layer()))
    assert not masks
    differs = compare_gradients(gradients_of(model, BATCH), found)
    assert differs.loss <= 1e-5, differs
    assert differs.gradient <= 1e-5, differs
    assert differs.tensor <= 1e-4, differs


@pytest.mark.parametrize("tile_rows", [tiled.TILE_ROWS, 7])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2"])
def test_checkpointing_levels_are_bitwise_equal(
    model_type: str, tile_rows: int, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "TILE_ROWS", tile_rows)
    model = adapted_model(tmp_path, pico(model_type), DROPOUT, dtype="bfloat16")
    fast = install_fused_kernels(model)
    layers = LayerCheckpointing(model.model, fast.mlps)
    wanted = gradients_of(model, BATCH)
    for level in (level for level in LEVELS if layers.supports(level)):
        layers.set(level)
        found = compare_gradients(wanted, gradients_of(model, BATCH))
        assert (found.loss, found.gradient) == (0, 0), level


def test_evaluation_mode_has_no_dropout(pico_llama: Path, tmp_path: Path) -> None:
    model = adapted_model(tmp_path, pico_llama, DROPOUT)
    fast = install_fused_kernels(model)
    state = torch.get_rng_state()
    model.model.eval()
    found = label_losses(model.model, **BATCH).nll
    assert torch.equal(state, torch.get_rng_state())
    fast.uninstall()
    torch.testing.assert_close(found, label_losses(model.model, **BATCH).nll, rtol=1e-5, atol=1e-5)


def test_parity_check_of_a_run_has_no_dropout(pico_llama: Path, tmp_path: Path) -> None:
    model = adapted_model(tmp_path, pico_llama, DROPOUT)
    wanted = gradients_of(model, BATCH)
    fast = install_fused_kernels(model)
    found = compare_gradients(wanted, gradients_of(model, BATCH))
    assert (found.loss < 1e-5, found.gradient < 1e-5) == (True, True)
    assert fast.mlps
    rates = {m.lora_dropout["default"].p for m in model.model.modules() if isinstance(m, LoraLayer)}
    assert rates == {RATE}


def test_memory_plan_counts_the_masks(pico_llama: Path, tmp_path: Path) -> None:
    model = adapted_model(tmp_path, pico_llama, DROPOUT)
    layers = LayerCheckpointing(model.model, install_fused_kernels(model).mlps)
    model.model.train()
    kept = saved_bytes(model.model, layers, lambda: label_losses(model.model, **BATCH))["none"]
    with lora_dropout_off(model.model.modules()):
        without = saved_bytes(model.model, layers, lambda: label_losses(model.model, **BATCH))["none"]
    mask_bytes = kept[0] - without[0]
    hidden, inner = 64, 128
    assert mask_bytes == IDS.numel() * (3 * hidden + inner)  # read by q, k and v; o; gate and up; down
    shape = model_shapes(model.loaded.model.config.to_dict(), LoraSection(r=8))
    batch = MicroBatch(IDS.numel(), IDS.shape[1], IDS.numel())
    on, off = (
        planned_bytes(shape, shape.layers[0], batch, Computation(8, has_dropout=dropout), "none")
        for dropout in (True, False)
    )
    assert on - off == mask_bytes


@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_resumed_run_is_bitwise_equal(recompute: str, pico_llama: Path, tmp_path: Path, messages: Any) -> None:
    settings = (
        DROPOUT, "train.max_steps=4", "train.save_steps=2", "train.per_device_train_batch_size=6",
        f"train.gradient_checkpointing={recompute}",
    )  # fmt: skip
    straight = train_run(tmp_path, pico_llama, *settings, name="straight")
    assert "fused kernels: 14 adapted linear layers" in messages.text
    assert "padding-free: on (" in messages.text
    stopped_copy(straight, tmp_path / "stopped")
    resumed = train_run(tmp_path, pico_llama, *settings, name="stopped")
    assert adapter_bytes(resumed) == adapter_bytes(straight)
    assert losses(resumed) == losses(straight)
