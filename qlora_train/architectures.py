"""What a checkpoint does not tell about itself: one row per Hugging Face `model_type`.

Linear layers, the output head, fused projections and gradient checkpointing are found by walking the loaded model and
have no place here. A row holds what config.json leaves out (a class default), what would otherwise be learnt only after
a download (which layer names exist), and what no file says (which attention kernel computes the model rightly). A
`model_type` without a row trains on the generic row, which assumes nothing.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_train.errors import ConfigError, ModelError

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


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table.

    Attributes:
        model_type: as in config.json.
        linear_names: last name of each linear layer but the head, for an early check of `lora.target_modules`.
        default_positions: positions of a config.json that names none: the config class's default.
        chat_template: turns of a base model whose vocabulary has no token for them.
        attention: kernel to take when flash-attn is not installed.
        attention_reason: why `attention` is not sdpa; empty where it is. sdpa is refused where this is set.
        unlimited_key: a true value under this key of config.json means that positions do not end.
        linear_classes: subclasses of nn.Linear that compute the plain product; the library quantises none of them, so the
            loader does.
        packing_obstacle: why documents that are packed into one row would see each other; empty where they do not.
        no_adapter: last names of linear layers that cannot carry LoRA.
        no_adapter_reason: why they cannot.
        known: False for the generic row.
    """

    model_type: str
    linear_names: tuple[str, ...]
    default_positions: int | None
    chat_template: str = "chatml"
    attention: str = "sdpa"
    attention_reason: str = ""
    unlimited_key: str | None = None
    linear_classes: tuple[str, ...] = ()
    packing_obstacle: str = ""
    no_adapter: tuple[str, ...] = ()
    no_adapter_reason: str = ""
    known: bool = True


_SPLIT_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED_MLP = ("gate_proj", "up_proj", "down_proj")
_LLAMA_LIKE = _SPLIT_ATTENTION + _GATED_MLP
_NEOX_LIKE = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

_ROWS = (
    Architecture("llama", _LLAMA_LIKE, 2048, chat_template="llama2"),
    Architecture("mistral", _LLAMA_LIKE, 131072, chat_template="mistral"),
    Architecture("qwen2", _LLAMA_LIKE, 32768),
    Architecture("qwen3", _LLAMA_LIKE, 32768),
    Architecture("gemma", _LLAMA_LIKE, 8192, chat_template="gemma"),
    Architecture(
        "gemma2",
        _LLAMA_LIKE,
        8192,
        chat_template="gemma",
        attention="eager",
        attention_reason="its attention scores are soft-capped, which sdpa cannot do",
    ),
    Architecture("gemma3_text", _LLAMA_LIKE, 131072, chat_template="gemma"),
    Architecture("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), 4096),
    Architecture("phi", ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"), 2048),
    Architecture("gpt_neox", _NEOX_LIKE, 2048),
    Architecture("olmo2", _LLAMA_LIKE, 2048),
    Architecture("granite", _LLAMA_LIKE, 2048),
    Architecture("cohere", _LLAMA_LIKE, 8192),
    Architecture(
        "falcon",
        _NEOX_LIKE,
        2048,
        unlimited_key="alibi",
        linear_classes=("FalconLinear",),
        packing_obstacle="Transformers makes its attention mask without looking at positions",
    ),
    Architecture("starcoder2", (*_SPLIT_ATTENTION, "c_fc", "c_proj"), 4096),
    Architecture("smollm3", _LLAMA_LIKE, 32768),
)
ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}
_EVERY_LINEAR_NAME = frozenset(name for row in _ROWS for name in row.linear_names)


def detect(config: Mapping[str, Any]) -> Architecture:
    """Return the row for a config.json, or the generic row (`known=False`) when its model_type has none.

    Raises:
        ModelError: config.json has no model_type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelError(
            f"config.json: model_type: found {model_type!r}, which names no architecture; "
            f"use a checkpoint saved by Transformers, e.g. with model_type {', '.join(sorted(ARCHITECTURES))}"
        )
    generic = Architecture(model_type, linear_names=(), default_positions=None, known=False)
    return ARCHITECTURES.get(model_type, generic)


def max_positions(config: Mapping[str, Any], architecture: Architecture) -> int | None:
    """Return the longest input in tokens that the checkpoint itself supports; None where nothing limits or tells it.

    A rope scaling inside config.json counts only when it names the length it starts from; otherwise the number of
    positions is taken to include it, as the checkpoints of its authors do.
    """
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
        start = config.get("original_max_position_embeddings", start)
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
    foreign = _EVERY_LINEAR_NAME - set(architecture.linear_names)
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
    if architecture.packing_obstacle:
        raise ConfigError(
            f"data.packing: true, but the documents of a pack would see each other in a {architecture.model_type} model: "
            f"{architecture.packing_obstacle}; set data.packing to false"
        )


def default_chat_template(architecture: Architecture, vocabulary: Container[str]) -> str:
    """Return the name of the chat template for a base model without one.

    The turn tokens in its vocabulary decide (a llama of the third generation, or SmolLM2, is not taught Llama-2's
    turns); the row's own template is for vocabularies without any.
    """
    marked = (template for token, template in TEMPLATE_MARKERS.items() if token in vocabulary)
    return next(marked, architecture.chat_template)
