"""Fused kernels on every family: loss and gradients match the reference."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.architectures import ARCHITECTURES
from qlora_train.kernels.install import install
from qlora_train.objectives.label_losses import label_losses
from qlora_train.training.parity.gradients import compare_gradients, gradients_of
from tests.architectures.conftest import Table
from tests.support.batches import BATCH
from tests.support.runs import adapted_model

Pico = Callable[..., Path]
BATCH["attention_mask"][1, 15:], BATCH["labels"][1, 15:] = 0, -100
SHORT = {
    "adapted linear layers": "layers", "gated MLPs": "MLPs", "RMS norms": "norms", "rotary embeddings": "rotary",
    "attentions": "attn",
}  # fmt: skip
BY_HAND = ("llama", "gemma2", "qwen2", "phi3", "glm4", "olmo2", "granite", "cohere", "mamba")
"""Families without experts, whose routing could change by rounding."""


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_fused_kernels_match_the_reference(model_type: str, pico: Pico, tmp_path: Path, table: Table) -> None:
    model = adapted_model(tmp_path, pico(model_type))
    wanted = gradients_of(model, BATCH)
    fast = install(model.model, lambda: label_losses(model.model, **BATCH))
    found = compare_gradients(wanted, gradients_of(model, BATCH))
    assert found.loss <= 1e-5, found
    assert found.gradient <= 1e-5, found
    assert found.tensor <= 1e-4, found
    assert fast.counts["adapted linear layers"] or fast.skipped
    fast.uninstall()
    again = compare_gradients(wanted, gradients_of(model, BATCH))
    assert (again.loss, again.gradient) == (0, 0)
    fused = ", ".join(
        f"{fast.counts[operation]} {short}" for operation, short in SHORT.items() if fast.counts[operation]
    )
    table[model_type]["fused kernels"] = f"{fused} ({found.gradient:.0e})"


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_fused_kernels_match_with_eager_attention(model_type: str, pico: Pico, tmp_path: Path) -> None:
    model = adapted_model(tmp_path, pico(model_type), "model.attn_implementation=eager")
    wanted = gradients_of(model, BATCH)
    fast = install(model.model, lambda: label_losses(model.model, **BATCH))
    if not fast.counts["attentions"]:
        pytest.skip("its attention is another one")
    found = compare_gradients(wanted, gradients_of(model, BATCH))
    assert found.gradient <= 1e-5, found
    assert found.tensor <= 1e-4, found


@pytest.mark.parametrize("model_type", BY_HAND)
def test_bfloat16_kernels_are_as_close_to_float32_as_the_reference(model_type: str, pico: Pico, tmp_path: Path) -> None:
    eager = "model.attn_implementation=eager"
    exact = gradients_of(adapted_model(tmp_path / "exact", pico(model_type), eager), BATCH)
    rounded = adapted_model(tmp_path / "rounded", pico(model_type), eager, dtype="bfloat16")
    plain = compare_gradients(exact, gradients_of(rounded, BATCH))
    install(rounded.model, lambda: label_losses(rounded.model, **BATCH))
    fast = compare_gradients(exact, gradients_of(rounded, BATCH))
    assert 1e-4 < plain.gradient < 0.1
    assert fast.gradient <= 1.5 * plain.gradient
    assert fast.loss <= 1.5 * plain.loss + 5e-4
