"""Text models inside multimodal checkpoints, for text-only loading (`qlora_train/models/text_only.py`).

config.json usually has a `text_config`; this table is for checkpoints that omit its type, for language models that exist
only in multimodal checkpoints, and for models that need their vision or audio encoder.
"""

from collections.abc import Mapping
from typing import Any

from qlora_train.architectures.table import ARCHITECTURES, LLAMA, NO_POSITIONS, Architecture

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
"""`model_type` of a multimodal checkpoint -> default `model_type` of its text config."""
NEEDS_ENCODERS = {
    "paligemma": "its attention over text is bidirectional, so that each token would attend to its label",
    "qwen2_audio": "its code reads the device of its audio encoder, even for text",
}
"""`model_type` of a checkpoint that cannot be loaded text-only -> the reason."""
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
"""Language models that exist only inside multimodal checkpoints."""


def text_config(config: Mapping[str, Any]) -> Any:
    """Return the text config of a multimodal config.json, else the whole."""
    inner = config.get(TEXT_CONFIG)
    return inner if isinstance(inner, Mapping) else config


def row_of(config: Mapping[str, Any]) -> Architecture | None:
    """Return the row of a config's text model, or None."""
    model_type = text_type(config)
    return ARCHITECTURES.get(model_type) or TEXT_ARCHITECTURES.get(model_type)


def text_type(config: Mapping[str, Any]) -> str:
    """Return the `model_type` of a config's text model."""
    whole = config["model_type"]
    inner = text_config(config)
    named = None if inner is config else inner.get("model_type")
    return named if isinstance(named, str) else TEXT_TYPES.get(whole, whole)
