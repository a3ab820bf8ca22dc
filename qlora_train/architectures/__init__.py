"""Properties of architectures that neither config.json nor the loaded model has, by `model_type`, and checks with them.

A `model_type` without a row uses the generic row, which assumes nothing.
"""

from collections.abc import Container, Mapping
from typing import Any

from qlora_train.architectures.multimodal import (
    NEEDS_ENCODERS,
    TEXT_ARCHITECTURES,
    TEXT_TYPES,
    row_of,
    text_config,
    text_type,
)
from qlora_train.architectures.table import ARCHITECTURES, EVERY_LINEAR_NAME, Architecture
from qlora_train.utils.errors import ConfigError, ModelError

__all__ = [
    "ARCHITECTURES",
    "NEEDS_ENCODERS",
    "TEXT_ARCHITECTURES",
    "TEXT_TYPES",
    "Architecture",
    "check_max_length",
    "check_packing",
    "check_target_modules",
    "default_chat_template",
    "detect",
    "max_positions",
    "text_config",
]

POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
"""Keys of config.json with the number of positions, by precedence."""
ROPES_FROM_ORIGINAL = ("llama3", "longrope", "yarn")
"""RoPE types whose factor multiplies `original_max_position_embeddings`."""
TEMPLATE_MARKERS = {
    "<|im_start|>": "chatml",
    "<|start_header_id|>": "llama3",
    "<start_of_turn>": "gemma",
    "[INST]": "mistral",
}
"""Token that starts a turn -> the chat template that uses it."""


def detect(config: Mapping[str, Any]) -> Architecture:
    """Return the row for a config.json (its text config if multimodal), or the generic row (`known=False`).

    Raises:
        ModelError: config.json has no model_type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelError(
            f"config.json: model_type: found {model_type!r}, which names no architecture; "
            f"use a checkpoint saved by Transformers, e.g. with model_type {', '.join(sorted(ARCHITECTURES))}"
        )
    generic = Architecture(text_type(config), linear_names=(), default_positions=None, known=False)
    return row_of(config) or generic


def max_positions(config: Mapping[str, Any], architecture: Architecture) -> int | None:
    """Return the maximum input length in tokens of the checkpoint, or None if it is unlimited or unknown.

    RoPE scaling in config.json counts if it has `original_max_position_embeddings`; else the positions include it.
    """
    config = text_config(config)
    if architecture.unlimited_key and config.get(architecture.unlimited_key):
        return None
    found = (config[key] for key in POSITION_KEYS if isinstance(config.get(key), int))
    positions = next(found, architecture.default_positions)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if positions is None or not original or not factor:
        return positions
    return max(positions, int(original * factor))


def _scaled_positions(config: Mapping[str, Any], positions: int, rope_scaling: Mapping[str, Any]) -> int:
    # the user's scaling replaces the one in config.json
    start = rope_scaling.get("original_max_position_embeddings", positions)
    if rope_scaling["rope_type"] in ROPES_FROM_ORIGINAL:
        # in Transformers this key of config.json (as in Phi-3) has precedence over the RoPE settings
        start = text_config(config).get("original_max_position_embeddings", start)
    return int(start * rope_scaling["factor"])


def check_max_length(
    config: Mapping[str, Any], architecture: Architecture, max_length: int, rope_scaling: Mapping[str, Any] | None
) -> None:
    """Check `data.max_length` against the model's positions, scaled by `model.rope_scaling`.

    Raises:
        ConfigError: max_length exceeds them.
    """
    positions = max_positions(config, architecture)
    if positions is None:
        return
    reach = positions if rope_scaling is None else _scaled_positions(config, positions, rope_scaling)
    if max_length <= reach:
        return
    factor = -(-max_length // positions)
    scaled = "" if rope_scaling is None else f" and reaches {reach} with model.rope_scaling {dict(rope_scaling)}"
    raise ConfigError(
        f"data.max_length: {max_length} tokens, but this {architecture.model_type} model has {positions} positions"
        f"{scaled}; set data.max_length to {reach} or less, "
        f"or model.rope_scaling to e.g. {{rope_type: yarn, factor: {factor}.0}}"
    )


def check_target_modules(architecture: Architecture, target_modules: str | tuple[str, ...]) -> None:
    """Check layer names before a download; unknown names, patterns and `all-linear` need the loaded model.

    Raises:
        ConfigError: a name that only other architectures have.
    """
    if isinstance(target_modules, str) or not architecture.known:
        return
    foreign = EVERY_LINEAR_NAME - set(architecture.linear_names)
    wrong = [name for name in target_modules if name.rsplit(".", 1)[-1] in foreign]
    if wrong:
        raise ConfigError(
            f"lora.target_modules: {', '.join(wrong)}: no such layer in a {architecture.model_type} model; "
            f"it has {', '.join(architecture.linear_names)}; all-linear targets all of them"
        )


def check_packing(architecture: Architecture) -> None:
    """Raise a ConfigError if packed documents would attend to each other."""
    if architecture.packing_error:
        raise ConfigError(
            f"data.packing: true, but packed documents would attend to each other in a {architecture.model_type} model: "
            f"{architecture.packing_error}; set data.packing to false"
        )


def default_chat_template(architecture: Architecture, vocabulary: Container[str]) -> str:
    """Return the chat template for a base model without one, by the turn tokens in its vocabulary, else by its row."""
    marked = (template for token, template in TEMPLATE_MARKERS.items() if token in vocabulary)
    return next(marked, architecture.chat_template)
