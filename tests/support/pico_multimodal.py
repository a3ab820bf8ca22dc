"""Pico multimodal checkpoints: a small language model with small encoders, saved as for users."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from tests.support.pico import COMMON, FAMILIES, STD, save_pico_tokenizer

_TEXT: dict[str, Any] = {**COMMON, "head_dim": 16}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_MROPE: dict[str, Any] = {"rope_parameters": _SECTIONS}
_HALF_MROPE: dict[str, Any] = {
    "rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
}
_EXPERTS = FAMILIES["mixtral"]
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "mlp_ratio": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "initializer_range": STD,
    "global_head_dim": 16,
    "num_key_value_heads": 2,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
"""Settings of every encoder, as far as its config has them."""


def _as(model_type: str, **own: Any) -> dict[str, Any]:
    return {"model_type": model_type, **FAMILIES.get(model_type, {}), **own}


WHOLE: dict[str, dict[str, Any]] = {
    "aria": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "aya_vision": _as("cohere2"),
    "cohere2_vision": _as("cohere2"),
    "deepseek_vl": _as("llama"),
    "gemma3": _as("gemma3_text"),
    "gemma4": {
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
        "sliding_window": 64,
        "tie_word_embeddings": True,
    },
    "glm4v": _HALF_MROPE,
    "glm4v_moe": {**_EXPERTS, **_HALF_MROPE},
    "got_ocr2": _as("qwen2"),
    "granite_speech": _as("granite"),
    "idefics2": _as("mistral"),
    "idefics3": _as("llama"),
    "internvl": _as("qwen2"),
    "lfm2_vl": _as("lfm2"),
    "lighton_ocr": _as("qwen3"),
    "llama4": _as("llama4_text", intermediate_size_mlp=128),
    "llava": _as("llama"),
    "llava_next": _as("llama"),
    "llava_onevision": _as("qwen2"),
    "mistral3": _as("mistral"),
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen3_5": {**FAMILIES["qwen3_5_text"], **_MROPE},
    "qwen3_5_moe": {**FAMILIES["qwen3_5_moe_text"], **_MROPE},
    "qwen3_vl": _MROPE,
    "qwen3_vl_moe": {**_EXPERTS, **_MROPE},
    "smolvlm": _as("llama"),
    "video_llama_3": _as("qwen2"),
    "video_llava": _as("llama"),
    "vipllava": _as("llama"),
    "voxtral": _as("llama"),
}
"""Differences of the text part from `_TEXT`, a row a `model_type` of the whole."""


def build_whole_config(model_type: str, text: dict[str, Any] | None = None) -> Any:
    """Return the Transformers config of a pico multimodal checkpoint."""
    usual = AutoConfig.for_model(model_type)
    parts: dict[str, Any] = {}
    for name in type(usual).sub_configs:
        own = getattr(usual, name) or type(usual).sub_configs[name]()
        small = {key: value for key, value in _TOWER.items() if hasattr(own, key)}
        parts[name] = {**small, "model_type": own.model_type}
    parts["text_config"] = {**_TEXT, **(WHOLE[model_type] if text is None else text)}
    tied = parts["text_config"]["tie_word_embeddings"]
    return AutoConfig.for_model(model_type, **parts, image_token_id=319, pad_token_id=0, tie_word_embeddings=tied)


def build_whole(folder: Path, model_type: str) -> Path:
    """Save a pico multimodal checkpoint with its tokenizer under `folder`, and return the folder."""
    config = build_whole_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    save_pico_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}\n', encoding="utf-8")
    return folder
