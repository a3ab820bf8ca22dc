"""Mixtures of experts: adapters of stacked matrices, checkpoints with a tensor an expert, and experts held in 4 bits."""

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_train.config import ModelSection, QuantizationSection
from qlora_train.export.merging.meta_model import build_meta_model
from qlora_train.models import load_model
from qlora_train.models.moe import expert_parameters
from tests.support.merging import (
    EXPERTS,
    MIXTURES,
    Pico,
    Tensors,
    adapted,
    change_adapter,
    logits,
    merged_logits,
    mixture,
    peft_merged_logits,
    plain,
    put_4bit_weight,
    save_adapter,
    tensor_shapes,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_merged_experts_compute_what_the_adapter_computes(
    pico: Pico, tmp_path: Path, model_type: str, dtype: str
) -> None:
    base = mixture(pico, model_type, dtype=dtype)
    adapter = adapted(base, tmp_path / "adapter")
    expected = logits(PeftModel.from_pretrained(plain(base), adapter))
    got = merged_logits(base, adapter, tmp_path / "merged")
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    assert (logits(plain(base)) - expected).abs().max() > 0.1, "the adapter changes too little to prove anything"
    assert tensor_shapes(tmp_path / "merged") == tensor_shapes(base), "the names that save_pretrained writes"


def added_by_hand(base: Path, adapter: Path, output: Path) -> Tensors:
    """Add the change that each of PEFT's layers says it makes, save, and return what has been written."""
    model = PeftModel.from_pretrained(plain(base), adapter)
    for module in [module for module in model.modules() if hasattr(module, "get_delta_weight")]:
        name = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
        getattr(module.get_base_layer(), name).data += module.get_delta_weight("default").detach()
    model.unload().save_pretrained(output)
    return load_file(output / "model.safetensors")


def test_every_tensor_of_a_mixture_is_what_adding_by_hand_gives(pico: Pico, tmp_path: Path) -> None:
    base = mixture(pico, "qwen3_moe")
    adapter = adapted(base, tmp_path / "adapter")
    expected = added_by_hand(base, adapter, tmp_path / "by_hand")
    merged_logits(base, adapter, tmp_path / "merged")
    got = load_file(tmp_path / "merged" / "model.safetensors")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_plain_model_is_written_to_the_byte_as_adding_by_hand_writes_it(pico_llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    added_by_hand(pico_llama, adapter, tmp_path / "by_hand")
    merged_logits(pico_llama, adapter, tmp_path / "merged")
    expected, got = (tmp_path / name / "model.safetensors" for name in ("by_hand", "merged"))
    assert got.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"target_parameters": ["experts.down_proj"]},
        {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
        {"target_parameters": [*EXPERTS, "gate.weight"]},
    ],
    ids=str,
)
def test_settings_of_experts_mean_what_they_mean_to_peft(pico: Pico, tmp_path: Path, settings: dict[str, Any]) -> None:
    base = mixture(pico, "qwen3_moe")
    adapter = adapted(base, tmp_path / "adapter", **settings)
    got = merged_logits(base, adapter, tmp_path / "merged")
    torch.testing.assert_close(got, peft_merged_logits(base, adapter), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_square_matrices_are_transposed_as_the_model_says(pico: Pico, tmp_path: Path, model_type: str) -> None:
    base = mixture(pico, model_type, hidden_size=64, intermediate_size=64)
    adapter = adapted(base, tmp_path / "adapter", target_parameters=["experts.down_proj"])
    got = merged_logits(base, adapter, tmp_path / "merged")
    torch.testing.assert_close(got, peft_merged_logits(base, adapter), atol=1e-5, rtol=1e-5)


def test_matrices_and_biases_of_experts_are_distinguished(pico: Pico, tmp_path: Path) -> None:
    base = mixture(pico, "gpt_oss")
    targets = [*EXPERTS, "experts.gate_up_proj_bias", "experts.down_proj_bias"]
    adapter = adapted(base, tmp_path / "adapter", target_parameters=targets, bias="all")
    got = merged_logits(base, adapter, tmp_path / "merged")
    torch.testing.assert_close(got, peft_merged_logits(base, adapter), atol=1e-5, rtol=1e-5)


def test_experts_in_one_tensor_are_merged_under_that_name(pico: Pico, tmp_path: Path) -> None:
    written = mixture(pico, "mixtral")
    base = tmp_path / "base"
    shutil.copytree(written, base)
    (base / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(written).save_pretrained(base, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensor_shapes(base)
    adapter = adapted(written, tmp_path / "adapter")
    got = merged_logits(base, adapter, tmp_path / "merged")
    torch.testing.assert_close(got, merged_logits(written, adapter, tmp_path / "other"), atol=0, rtol=0)
    assert tensor_shapes(tmp_path / "merged") == tensor_shapes(base)


def test_experts_spread_over_shards_are_the_same(pico: Pico, tmp_path: Path) -> None:
    base = mixture(pico, "qwen3_moe")
    adapter = adapted(base, tmp_path / "adapter")
    whole = merged_logits(base, adapter, tmp_path / "whole")
    got = merged_logits(base, adapter, tmp_path / "parts", max_shard_size="50KB")
    files = list((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 10, "a layer's experts do not fit into one file"
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert [size for size in sizes if size > 50_000] == 2 * [320 * 64 * 4], "but embedding and head, none is larger"
    torch.testing.assert_close(got, whole, atol=0, rtol=0)


def in_4_bits(base: Path) -> Any:
    """Return the base in float32 with the linear layers of a 4-bit load, and each expert's matrix rounded by itself."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    kept = ["lm_head", "mlp.shared_expert_gate"]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=kept, **settings
    )
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    reference = plain(base)
    for name, module in loaded.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            put_4bit_weight(reference.get_submodule(name), module)
        if type(module).__name__.endswith("Experts"):
            for part in [part for part, stack in module.named_parameters(recurse=False) if stack.ndim == 3]:
                matrices = [rounded(matrix) for matrix in getattr(module, part).data]
                getattr(reference.get_submodule(name), part).data = torch.stack(matrices).float()
    return reference


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """Round a matrix as one row of numbers: bitsandbytes 0.50 mistakes rows that are no whole number of blocks on CPUs."""
    codes, state = bnb.functional.quantize_nf4(matrix.flatten(), blocksize=64, compress_statistics=True)
    return bnb.functional.dequantize_nf4(codes, state).view(matrix.shape)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_are_quantized_one_by_one(pico: Pico, tmp_path: Path, model_type: str) -> None:
    base = mixture(pico, model_type)
    adapter = adapted(base, tmp_path / "adapter")
    expected = logits(PeftModel.from_pretrained(in_4_bits(base), adapter))
    got = merged_logits(base, adapter, tmp_path / "merged", merge_base="dequantized", load_dtype=torch.bfloat16)
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-4)
    assert (logits(PeftModel.from_pretrained(plain(base), adapter)) - expected).abs().max() > 0.1, "nothing was rounded"


class Computed(nn.Module):
    """A parametrisation that leaves a parameter as it is."""

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_wrappers_of_parametrized_parameters_are_distinguished(pico: Pico, tmp_path: Path) -> None:
    """PEFT wraps the parameters of a parametrised module in another order, which the adapter does not record."""
    base = mixture(pico, "qwen3_moe")
    computed = plain(base)
    names = [f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in EXPERTS]
    for name in names:
        module, _, parameter = name.rpartition(".")
        parametrize.register_parametrization(computed.get_submodule(module), parameter, Computed())
    other = save_adapter(computed, tmp_path / "other", target_modules=["q_proj", "o_proj"], target_parameters=names)

    def swap_wrappers(tensors: Tensors) -> None:
        swapped = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
        inner, outer = ".experts.base_layer.", ".experts."
        for name, tensor in swapped.items():
            tensors[name.replace(inner, outer) if inner in name else name.replace(outer, inner)] = tensor

    adapter = adapted(base, tmp_path / "adapter")
    expected = peft_merged_logits(base, adapter)
    change_adapter(adapter, swap_wrappers)
    shapes = [
        {name: tensor.shape for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (adapter, other)
    ]
    assert shapes[0] == shapes[1], "PEFT's own order for them"
    torch.testing.assert_close(merged_logits(base, adapter, tmp_path / "merged"), expected, atol=1e-5, rtol=1e-5)


def test_quantized_parameters_are_known_from_the_meta_model(pico: Pico) -> None:
    for base in (
        mixture(pico, "qwen2_moe"),
        mixture(pico, "gpt_oss"),
        pico("llama"),
        pico("phi", tie_word_embeddings=True),
    ):
        loaded = load_model(ModelSection(model_name_or_path=str(base)), QuantizationSection()).model
        layers = {name for name, module in loaded.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
        meta_model = build_meta_model(loaded.config)
        assert meta_model.linears == layers
        assert meta_model.experts == set(expert_parameters(loaded))
