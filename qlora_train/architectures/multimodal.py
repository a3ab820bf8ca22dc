"""Multimodal checkpoints that train on text: which text model is in each, by the `model_type` of the whole.

config.json usually contains it (`text_config`). This table is for files without it, for language models that exist only
inside multimodal ones, and for models that do not run without an encoder. Encoders themselves are found by walking the
model (`qlora_train/models/text_only.py`).
"""

from collections.abc import Mapping
from typing import Any

from qlora_train.architectures.row import Architecture
from qlora_train.architectures.table import ARCHITECTURES, LLAMA, NO_POSITIONS

TEXT_CONFIG = "text_config"
TEXT_TYPES = {
    "aria": "aria_text",
    "aya_vision": "cohere2",
    "cohere2_vision": "cohere2",
    "deepseek_vl": "llama",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "glm4v": "glm4v_text",
    "glm4v_moe": "glm4v_moe_text",
    "got_ocr2": "qwen2",
    "granite_speech": "granite",
    "idefics2": "mistral",
    "idefics3": "llama",
    "internvl": "qwen2",
    "janus": "llama",
    "kimi_k25": "deepseek_v3",
    "lfm2_vl": "lfm2",
    "lighton_ocr": "qwen3",
    "llama4": "llama4_text",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "ovis2": "qwen2",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "smolvlm": "llama",
    "video_llama_3": "qwen2",
    "video_llava": "llama",
    "vipllava": "llama",
    "voxtral": "llama",
}
"""`model_type` of a whole checkpoint -> that of its text part where config.json names none: the config class's default."""
NEEDS_ENCODERS = {
    "paligemma": "it reads a text in both directions, so that each token would see those it is to learn",
    "qwen2_audio": "its code asks the audio encoder for its device, even for text",
}
"""`model_type` of multimodal models that need their encoders for text -> reason."""
_ROWS = (
    Architecture("aria_text", LLAMA, 2048),
    Architecture(
        "gemma4_text",
        (*LLAMA, "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"),
        131072,
        chat_template="gemma",
    ),
    Architecture(
        "glm4v_text",
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
        32768,
        packing_error=NO_POSITIONS,
    ),
    Architecture("glm4v_moe_text", LLAMA, 65536, packing_error=NO_POSITIONS),
    Architecture("qwen2_vl_text", LLAMA, 32768, packing_error=NO_POSITIONS),
    Architecture("qwen2_5_vl_text", LLAMA, 32768, packing_error=NO_POSITIONS),
    Architecture("qwen3_vl_text", LLAMA, 128000),
    Architecture("qwen3_vl_moe_text", ("q_proj", "k_proj", "v_proj", "o_proj"), 128000),
)
TEXT_ARCHITECTURES = {row.model_type: row for row in _ROWS}
"""Rows of language models that are tried inside a whole checkpoint alone."""


def text_config(config: Mapping[str, Any]) -> Any:
    """Return what config.json says of the text model: its own part in a multimodal checkpoint, else all of it."""
    part = config.get(TEXT_CONFIG)
    return part if isinstance(part, Mapping) else config


def row_of(config: Mapping[str, Any]) -> Architecture | None:
    """Return the row of a config's text model, if there is one."""
    model_type = text_type(config)
    return ARCHITECTURES.get(model_type) or TEXT_ARCHITECTURES.get(model_type)


def text_type(config: Mapping[str, Any]) -> str:
    """Return the `model_type` of a config's text model, which is the config's own where nothing lies inside it."""
    whole = config["model_type"]
    part = text_config(config)
    named = None if part is config else part.get("model_type")
    return named if isinstance(named, str) else TEXT_TYPES.get(whole, whole)
