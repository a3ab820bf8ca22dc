"""Checkpoints whose names or layouts are not the model's: prefixes, other encoders, transposed layers, conversions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from qlora_train.utils.errors import MergeError
from tests.support.merging import (
    EXPERTS,
    MIXTURES,
    Pico,
    dequantized_reference,
    logits,
    merged_logits,
    peft_merged_logits,
    plain,
    quantized,
    save_adapter,
    tensor_shapes,
    with_tensors,
)
from tests.support.pico import COMMON, STD, save_pico_tokenizer

GPT2 = {"n_inner": 128, "n_positions": 256}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["c_fc"]}], ids=str)
def test_transposed_layers_are_merged(pico: Pico, tmp_path: Path, settings: dict[str, Any]) -> None:
    base = pico("gpt2", **GPT2)
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapter = save_adapter(plain(base), tmp_path / "adapter", **targets, **settings)
    got = merged_logits(base, adapter, tmp_path / "merged")
    torch.testing.assert_close(got, peft_merged_logits(base, adapter), atol=1e-5, rtol=1e-5)
    assert (logits(plain(base)) - got).abs().max() > 0.1, "the adapter changes too little to prove anything"
    assert tensor_shapes(tmp_path / "merged") == tensor_shapes(base)


@pytest.mark.parametrize("stored", [False, True], ids=["rounded while loading", "stored in 4 bits"])
def test_transposed_layers_are_quantized_as_bitsandbytes_stores_them(pico: Pico, tmp_path: Path, stored: bool) -> None:
    base = pico("gpt2", **GPT2)
    adapter = save_adapter(quantized(base), tmp_path / "adapter")
    expected = logits(PeftModel.from_pretrained(dequantized_reference(base), adapter))
    if stored:
        quantized(base).save_pretrained(tmp_path / "base")
        base = tmp_path / "base"
    got = merged_logits(base, adapter, tmp_path / "merged", merge_base="dequantized", load_dtype=torch.bfloat16)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "prefix", "settings"),
    [("gpt2", "transformer.", GPT2), ("llama", "model.", {}), ("qwen3_moe", "model.", MIXTURES["qwen3_moe"])],
)
def test_a_base_without_its_prefix_keeps_its_names(
    pico: Pico, tmp_path: Path, model_type: str, prefix: str, settings: dict[str, Any]
) -> None:
    of_head = pico(model_type, **settings, tie_word_embeddings=True)
    base = with_tensors(
        of_head, tmp_path / "base", lambda tensors: {name.removeprefix(prefix): t for name, t in tensors.items()}
    )
    targets = {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS} if "moe" in model_type else {}
    adapter = save_adapter(plain(of_head), tmp_path / "adapter", **targets)
    got = merged_logits(base, adapter, tmp_path / "merged")
    torch.testing.assert_close(got, peft_merged_logits(of_head, adapter), atol=1e-5, rtol=1e-5)
    assert tensor_shapes(tmp_path / "merged") == tensor_shapes(base)


def build_multimodal(folder: Path, model_type: str, text: dict[str, Any], vision: dict[str, Any]) -> Path:
    """Save a pico model of text and pictures in bfloat16 with its tokenizer."""
    config = AutoConfig.for_model(model_type, text_config={**COMMON, **text}, vision_config=vision, image_token_id=319)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=STD)
    model.save_pretrained(folder)
    save_pico_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and vision model; prefixes in the file differ from the model's."""
    text = {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return build_multimodal(tmp_path_factory.mktemp("gemma3"), "gemma3", text, vision)


@pytest.fixture(scope="module")
def qwen3_5_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only its text model is loaded; its experts are stacked in the file too."""
    text = {
        "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 32, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    return build_multimodal(tmp_path_factory.mktemp("qwen3_5_moe"), "qwen3_5_moe", text, vision)


def test_multimodal_model_keeps_its_names_and_its_vision_encoder(gemma3: Path, tmp_path: Path) -> None:
    adapter = save_adapter(plain(gemma3), tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    got = merged_logits(gemma3, adapter, tmp_path / "merged")
    torch.testing.assert_close(got, peft_merged_logits(gemma3, adapter), atol=1e-5, rtol=1e-5)
    shapes = tensor_shapes(tmp_path / "merged")
    assert shapes == tensor_shapes(gemma3)
    assert {name.partition(".")[0] for name in shapes} == {"language_model", "vision_tower", "multi_modal_projector"}
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(whole.eval()), got, atol=0, rtol=0)


def test_text_part_is_quantized_and_dequantized(gemma3: Path, tmp_path: Path) -> None:
    share = {"min_quantized_share": 0.5}
    adapter = save_adapter(quantized(gemma3, **share), tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    reference = PeftModel.from_pretrained(dequantized_reference(gemma3, **share), adapter).merge_and_unload()
    merged_logits(gemma3, adapter, tmp_path / "merged", merge_base="dequantized", load_dtype=torch.bfloat16)
    merged = plain(tmp_path / "merged")
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("original", [True, False], ids=["the file's names", "the model's names"])
def test_untied_head_is_named_like_its_neighbours(gemma3: Path, tmp_path: Path, original: bool) -> None:
    base = tmp_path / "base"
    AutoModelForImageTextToText.from_pretrained(gemma3).save_pretrained(base, save_original_format=original)
    adapter = save_adapter(plain(gemma3), tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    got = merged_logits(base, adapter, tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(plain(gemma3), adapter))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    added = set(tensor_shapes(tmp_path / "merged")) - set(tensor_shapes(base))
    assert added == {"language_model.lm_head.weight" if original else "lm_head.weight"}


def test_encoders_that_are_not_loaded_are_copied(
    qwen3_5_moe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="qlora_train")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapter = save_adapter(plain(qwen3_5_moe), tmp_path / "adapter", **targets)
    got = merged_logits(qwen3_5_moe, adapter, tmp_path / "merged")
    torch.testing.assert_close(got, peft_merged_logits(qwen3_5_moe, adapter), atol=1e-5, rtol=1e-5)
    before, after = (load_file(folder / "model.safetensors") for folder in (qwen3_5_moe, tmp_path / "merged"))
    assert before.keys() == after.keys()
    eyes = [name for name in before if name.startswith("model.visual.")]
    assert f"{len(eyes)} tensors copied (no parameter of the model)" in caplog.text
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in eyes)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(whole.eval()), got, atol=0, rtol=0)


def test_tensors_beyond_the_model_are_copied_as_they_are(
    pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="qlora_train")
    extra = {"mtp.fc.weight": torch.rand(3, 5), "model.layers.2.steps": torch.arange(4)}
    base = with_tensors(pico_llama, tmp_path / "base", lambda tensors: {**tensors, **extra})
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    merged_logits(base, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
    assert written["mtp.fc.weight"].dtype == torch.float32
    assert "2 tensors copied (no parameter of the model)" in caplog.text


def test_float32_parameters_of_transformers_stay_float32(pico: Pico, tmp_path: Path) -> None:
    experts = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    base = pico("glm4_moe", first_k_dense_replace=1, n_shared_experts=1, head_dim=16, **experts)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    uneven = torch.rand(4, generator=torch.Generator().manual_seed(0))
    changed = with_tensors(base, tmp_path / "base", lambda tensors: {**tensors, bias: uneven})
    adapter = save_adapter(plain(base), tmp_path / "adapter", target_modules=["q_proj"])
    merged_logits(changed, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    torch.testing.assert_close(plain(tmp_path / "merged").get_buffer(bias), uneven, atol=0, rtol=0)


def test_missing_parameter_is_a_warning(pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    partial = with_tensors(
        pico_llama, tmp_path / "base", lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}
    )
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter", target_modules=["q_proj"])
    merged_logits(partial, adapter, tmp_path / "merged")
    assert f"1 parameters of LlamaForCausalLM are missing in the base and random after each load: {name}" in caplog.text


def test_complete_base_gives_no_warning(pico: Pico, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for model_type in ("llama", "gemma"):  # the second has no head of its own
        adapter = save_adapter(plain(pico(model_type)), tmp_path / f"{model_type}-adapter")
        merged_logits(pico(model_type), adapter, tmp_path / model_type)
    assert "qlora_train" not in {
        record.name.partition(".")[0] for record in caplog.records if record.levelname == "WARNING"
    }


def test_two_tensors_of_one_parameter_are_refused(pico_llama: Path, tmp_path: Path) -> None:
    twice = with_tensors(
        pico_llama, tmp_path / "base", lambda tensors: {**tensors, "norm.weight": tensors["model.norm.weight"] * 2}
    )
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"model.norm.weight and norm.weight both hold model.norm.weight of the model"):
        merged_logits(twice, adapter, tmp_path / "merged")


def test_missing_quantized_weights_are_refused(pico_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    partial = with_tensors(
        pico_llama, tmp_path / "base", lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}
    )
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(MergeError, match=rf"1 weights that the run held in 4 bits are not in the files, e.g. {name}"):
        merged_logits(partial, adapter, tmp_path / "merged", merge_base="dequantized")


def test_unknown_dtype_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    in_8_bits = with_tensors(
        pico_llama, tmp_path / "base", lambda tensors: {**tensors, name: tensors[name].to(torch.float8_e4m3fn)}
    )
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    with pytest.raises(MergeError, match=rf"{name} is stored as F8_E4M3, which cannot be merged"):
        merged_logits(in_8_bits, adapter, tmp_path / "merged")
