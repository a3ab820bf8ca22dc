"""Planned activations are what autograd saves, for several families, with fused kernels and without, at every level."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_train.config import LoraSection
from qlora_train.kernels.install import install
from qlora_train.objectives.label_losses import label_losses
from qlora_train.planning.activations import Computation, MicroBatch, saved_bytes
from qlora_train.planning.meta_shapes import meta_shapes
from qlora_train.training.memory import activation_checkpointing
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing
from tests.support.pico import build_pico
from tests.support.runs import adapted_model

SHAPE = {
    "hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 1024,
}  # fmt: skip
NUM_TOKENS = 256
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "glm4", "olmo2", "smollm3", "granite", "mixtral",
    "qwen2_moe", "qwen3_moe",
)  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a model of 256 features: in narrower ones LoRA and head norms outweigh the rest."""
    return lambda family: build_pico(tmp_path_factory.mktemp(family), family, **SHAPE)


@pytest.mark.parametrize("fused_kernels", [True, False], ids=["fused", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_planned_activations_are_those_that_autograd_saves(
    family: str, fused_kernels: bool, wide: Callable[[str], Path], tmp_path: Path
) -> None:
    adapted = adapted_model(tmp_path, wide(family), dtype="bfloat16")
    adapted.model.enable_input_require_grads()
    ids = torch.randint(4, 300, (1, NUM_TOKENS))

    def forward() -> None:
        adapted.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            label_losses(adapted.model, input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))

    fused = install(adapted.model, forward) if fused_kernels else None
    layers = LayerCheckpointing(adapted.model, fused.mlps if fused is not None else [])
    measured = activation_checkpointing.saved_bytes(adapted.model, layers, forward)
    model = meta_shapes(adapted.loaded.model.config.to_dict(), LoraSection())
    batch, how = MicroBatch(NUM_TOKENS, NUM_TOKENS, NUM_TOKENS), Computation(8, fused_kernels=fused_kernels)
    positions = 2 * 2 * SHAPE["head_dim"] * NUM_TOKENS  # cos and sin, which all layers share
    assert measured.keys() >= {"none", "full"}
    for level, by_layer in measured.items():
        planned = saved_bytes(model, model.layers[-1], batch, how, level)
        shared = 0 if level == "full" else positions
        assert planned == pytest.approx(by_layer[-1] - shared, rel=0.12), level
        assert planned >= 0.95 * (by_layer[-1] - shared), level
