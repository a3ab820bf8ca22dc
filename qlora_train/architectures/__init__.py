"""What a checkpoint does not tell about itself, by Hugging Face `model_type`, and what follows from it before a download.

Linear layers, experts, routers, the output head and gradient checkpointing are found by walking the loaded model; the
table holds the rest. A `model_type` without a row trains on the generic row, which assumes nothing.
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
from qlora_train.architectures.row import Architecture
from qlora_train.architectures.table import ARCHITECTURES, EVERY_LINEAR_NAME
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
"""Where config.json keeps the number of positions, in the order of trust."""
ROPES_FROM_ORIGINAL = ("llama3", "longrope", "yarn")
"""Rope types whose factor multiplies `original_max_position_embeddings`, the length before any scaling."""
TEMPLATE_MARKERS = {
    "<|im_start|>": "chatml",
    "<|start_header_id|>": "llama3",
    "<start_of_turn>": "gemma",
    "[INST]": "mistral",
}
"""Token that opens a turn -> the chat template that uses it; a base model that has it is taught with it."""


def detect(config: Mapping[str, Any]) -> Architecture:
    """Return the row for a config.json, or the generic row (`known=False`) when its model_type has none.

    The row of a multimodal checkpoint is that of its text part.

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
    """Return the longest input in tokens that the checkpoint itself supports; None where nothing limits or tells it.

    A rope scaling inside config.json counts only when it names the length it starts from; otherwise the number of
    positions is taken to include it, as the checkpoints of its authors do.
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
    """Positions under the user's rope scaling, which replaces the one in config.json."""
    start = rope_scaling.get("original_max_position_embeddings", positions)
    if rope_scaling["rope_type"] in ROPES_FROM_ORIGINAL:
        # Transformers lets this key of a config (Phi-3 has it) win over the one inside the rope settings
        start = text_config(config).get("original_max_position_embeddings", start)
    return int(start * rope_scaling["factor"])


def check_max_length(
    config: Mapping[str, Any], architecture: Architecture, max_length: int, rope_scaling: Mapping[str, Any] | None
) -> None:
    """Refuse rows longer than the model's positions.

    Args:
        config: the content of config.json.
        architecture: from `detect`.
        max_length: `data.max_length`, in tokens.
        rope_scaling: `model.rope_scaling`, with rope_type and factor, or None.

    Raises:
        ConfigError: max_length exceeds the positions that the model has, or reaches with rope_scaling.
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
    """Refuse a list of layer names with one that belongs to other architectures only, before anything is downloaded.

    Names that no row knows, patterns and `all-linear` pass: only the loaded model can judge them.

    Raises:
        ConfigError: a name such as q_proj for a model with fused projections.
    """
    if isinstance(target_modules, str) or not architecture.known:
        return
    foreign = EVERY_LINEAR_NAME - set(architecture.linear_names)
    wrong = [name for name in target_modules if name.rsplit(".", 1)[-1] in foreign]
    if wrong:
        raise ConfigError(
            f"lora.target_modules: {', '.join(wrong)}: no such layer in a {architecture.model_type} model; "
            f"it has {', '.join(architecture.linear_names)}; all-linear takes them all"
        )


def check_packing(architecture: Architecture) -> None:
    """Refuse packing where the documents of a pack would see each other.

    Raises:
        ConfigError: the architecture cannot keep them apart.
    """
    if architecture.packing_error:
        raise ConfigError(
            f"data.packing: true, but the documents of a pack would see each other in a {architecture.model_type} model: "
            f"{architecture.packing_error}; set data.packing to false"
        )


def default_chat_template(architecture: Architecture, vocabulary: Container[str]) -> str:
    """Return the name of the chat template for a base model without one.

    The turn tokens in its vocabulary decide (a llama of the third generation, or SmolLM2, is not taught Llama-2's
    turns); the row's own template is for vocabularies without any.
    """
    marked = (template for token, template in TEMPLATE_MARKERS.items() if token in vocabulary)
    return next(marked, architecture.chat_template)
