"""Mixtures of experts that cannot be merged exactly are refused, and nothing is written then."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_train.utils.errors import MergeError
from tests.support.merging import Pico, Tensors, adapted, change_adapter, merged_logits, mixture


def _one_wrapper(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".experts.base_layer." in name]:
        del tensors[name]


def _other_rank(tensors: Tensors) -> None:
    for name, tensor in list(tensors.items()):
        if "layers.0.mlp.experts.lora_A" in name:
            tensors[name] = torch.cat([tensor, tensor])


def _three_wrappers(tensors: Tensors) -> None:
    for name, tensor in list(tensors.items()):
        if ".experts.base_layer." in name:
            tensors[name.replace(".base_layer", ".base_layer.base_layer")] = tensor.clone()


def _magnitude(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.0.mlp.experts.lora_magnitude_vector"] = torch.ones(64)


def _expert_by_expert(tensors: Tensors) -> None:
    for part, shape in (("lora_A", (4, 64)), ("lora_B", (96, 4))):
        name = f"base_model.model.model.layers.0.mlp.experts.0.gate_proj.{part}.weight"
        tensors[name] = torch.ones(shape)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_one_wrapper, r"unknown kind: .*experts.lora_A"),
        (_other_rank, r"experts has factors A and B of .*\(32, 96\).* ask for .*\(16, 96\).*merge onto the base"),
        (_three_wrappers, r"unknown kind: .*base_layer.base_layer.lora_A"),
        (_magnitude, r"unknown kind: .*experts.lora_magnitude_vector"),
        (_expert_by_expert, r"have no tensor .*experts.0.gate_proj.weight"),
    ],
)
def test_expert_adapter_with_unknown_tensors_is_refused(
    pico: Pico, tmp_path: Path, edit: Callable[[Tensors], None], message: str
) -> None:
    base = mixture(pico, "qwen3_moe")
    adapter = adapted(base, tmp_path / "adapter")
    change_adapter(adapter, edit)
    with pytest.raises(MergeError, match=message):
        merged_logits(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_wrappers_of_one_shape_in_two_possible_orders_are_refused(pico: Pico, tmp_path: Path) -> None:
    base = mixture(pico, "gpt_oss", hidden_size=192, intermediate_size=96)
    adapter = adapted(base, tmp_path / "adapter", target_parameters=["gate_up_proj_bias", "down_proj_bias"])
    with pytest.raises(MergeError, match=r"factors of the same shape for .*gate_up_proj_bias.*their order is unknown"):
        merged_logits(base, adapter, tmp_path / "merged")


def without(base: Path, folder: Path, name: str) -> Path:
    """Copy a base and leave one tensor out."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("experts.3.gate_proj", r"cannot convert it to model.layers.0.mlp.experts.gate_up_proj"),
        (
            "experts.3.down_proj",
            r"3 tensors like .*experts.0.down_proj.weight give shape \(3, 64, 96\), .*\(4, 64, 96\)",
        ),
    ],
)
def test_a_base_without_some_expert_is_refused(pico: Pico, tmp_path: Path, name: str, message: str) -> None:
    base = mixture(pico, "qwen3_moe")
    adapter = adapted(base, tmp_path / "adapter")
    broken = without(base, tmp_path / "base", f"model.layers.0.mlp.{name}.weight")
    with pytest.raises(MergeError, match=message):
        merged_logits(broken, adapter, tmp_path / "merged")


def test_experts_stored_twice_are_refused(pico: Pico, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(mixture(pico, "qwen3_moe"), base)
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = load_file(base / "model.safetensors") | {name: torch.zeros(4, 64, 96)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapted(mixture(pico, "qwen3_moe"), tmp_path / "adapter")
    with pytest.raises(MergeError, match=rf"{name} and .*experts.0.down_proj.weight both hold {name} of the model"):
        merged_logits(base, adapter, tmp_path / "merged")
