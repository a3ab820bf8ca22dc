"""Shapes of well-known model families, computed from config.json without torch.

A row says how a family's decoder layer is built; tests compare each with Transformers' own model, weight by weight. A
config of another family, or one that lacks a key, has no shapes here: `meta_shapes` builds the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_train.config import LoraSection
from qlora_train.planning.model_shape import AttentionShape, ExpertsShape, LayerShape, LinearShape, ModelShape

INPUT_NAMES = frozenset(
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "gate_proj", "up_proj", "gate_up_proj", "c_attn", "c_fc")
)  # fmt: skip
"""Linear layers that read the input of their module, so that those of one module read the same tensor."""


@dataclass(frozen=True, slots=True)
class Family:
    """How a decoder layer differs from Llama's.

    Attributes:
        num_norms: norms of the hidden state per layer.
        norm_parameters: per feature of a norm: weight, and bias.
        head_norm: queries and keys are normalized per head (`head`), in full width (`full`), or not (empty).
        qkv_bias, o_bias, mlp_bias: True, False, or the key of config.json that says so.
        fuses_qkv, fuses_gate: one matrix for q, k and v; for gate and up.
        mlp: names of the MLP's matrices; the last one is the output.
        ties_by_default: of a config.json without `tie_word_embeddings`.
        has_experts: it is a mixture of experts.
        expert_size_key: width of an expert.
        shared_expert_key: width of a shared expert with a gate of its own.
        eager: attention stores its scores.
    """

    num_norms: int = 2
    norm_parameters: int = 1
    head_norm: str = ""
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    fuses_qkv: bool = False
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    ties_by_default: bool = False
    has_experts: bool = False
    expert_size_key: str = "moe_intermediate_size"
    shared_expert_key: str = ""
    eager: bool = False


NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts")
"""Transformers reads either and writes the latter."""
_FUSED_MLP = ("gate_up_proj", "down_proj")
_BIASED = Family(qkv_bias="attention_bias", o_bias="attention_bias")
FAMILIES: Mapping[str, Family] = {
    "llama": replace(_BIASED, mlp_bias="mlp_bias"),
    "mistral": Family(),
    "ministral": Family(),
    "ministral3": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": replace(_BIASED, head_norm="head"),
    "gemma": replace(_BIASED, ties_by_default=True),
    "gemma2": replace(_BIASED, num_norms=4, ties_by_default=True, eager=True),
    "gemma3_text": replace(_BIASED, num_norms=4, head_norm="head", ties_by_default=True),
    "phi3": Family(fuses_qkv=True, mlp=_FUSED_MLP),
    "glm": Family(qkv_bias="attention_bias", mlp=_FUSED_MLP),
    "glm4": Family(num_norms=4, qkv_bias="attention_bias", mlp=_FUSED_MLP),
    "granite": replace(_BIASED, mlp_bias="mlp_bias"),
    "hunyuan_v1_dense": replace(_BIASED, head_norm="head"),
    "olmo2": replace(_BIASED, head_norm="full"),
    "olmo3": replace(_BIASED, head_norm="full"),
    "seed_oss": Family(qkv_bias="attention_bias", o_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "smollm3": replace(_BIASED, mlp_bias="mlp_bias", ties_by_default=True),
    "starcoder2": Family(
        norm_parameters=2, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", mlp=("c_fc", "c_proj"),
        ties_by_default=True,
    ),
    "mixtral": Family(has_experts=True, expert_size_key="intermediate_size"),
    "qwen2_moe": Family(qkv_bias=True, has_experts=True, shared_expert_key="shared_expert_intermediate_size"),
    "qwen3_moe": replace(_BIASED, head_norm="head", has_experts=True),
}  # fmt: skip


def family_shapes(config_json: Mapping[str, Any], lora: LoraSection) -> ModelShape | None:
    """Return the shapes of a base and where its adapter is; None if its family has no row or a key is missing."""
    family = FAMILIES.get(str(config_json.get("model_type")))
    if family is None or "text_config" in config_json or not _has_known_targets(lora):
        return None
    try:
        return _model(config_json, family, lora)
    except (KeyError, TypeError, StopIteration):  # as rare as a config.json that relies on a default of the class
        return None


def _has_known_targets(lora: LoraSection) -> bool:
    """Whether names suffice to say which layers are adapted; unknown names are an error that needs the model."""
    return lora.target_modules == "all-linear" and lora.target_parameters in ("auto", ())


def _model(config: Mapping[str, Any], family: Family, lora: LoraSection) -> ModelShape:
    hidden, vocabulary, num_layers = (config[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
    dense = _layer(config, family)
    sparse = _sparse_layer(config, family, dense, lora) if family.has_experts else dense
    is_dense = set(config.get("mlp_only_layers") or ())
    step = config.get("decoder_sparse_step", 1) if family.has_experts else 1
    layers = tuple(
        dense if index in is_dense or (index + 1) % step else sparse for index in range(num_layers)
    )  # fmt: skip
    is_tied = config.get("tie_word_embeddings", family.ties_by_default)
    return ModelShape(
        hidden_size=hidden,
        vocab_size=vocabulary,
        layers=layers,
        embedding_numel=vocabulary * hidden,
        head_numel=0 if is_tied else vocabulary * hidden,
        other_numel=family.norm_parameters * hidden,
    )


def _attention(config: Mapping[str, Any], family: Family) -> AttentionShape:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    key_width = (config.get("num_key_value_heads") or heads) * head_dim
    return AttentionShape(heads, heads * head_dim, key_width, key_width, bool(family.head_norm), family.eager)


def _layer(config: Mapping[str, Any], family: Family) -> LayerShape:
    hidden, attention = config["hidden_size"], _attention(config, family)
    widths = (attention.query_width, attention.key_width, attention.value_width)
    if family.fuses_qkv:
        linears = [LinearShape("qkv_proj", hidden, sum(widths), 0)]
    else:
        names = zip(("q_proj", "k_proj", "v_proj"), widths, strict=True)
        linears = [LinearShape(name, hidden, width, 0) for name, width in names]
    linears.append(LinearShape("o_proj", attention.query_width, hidden, 1))
    mlp = list(_mlp(family.mlp, hidden, config["intermediate_size"], first=2))
    biases = (
        _is_set(config, family.qkv_bias) * sum(widths)
        + _is_set(config, family.o_bias) * hidden
        + _is_set(config, family.mlp_bias) * sum(linear.out_features for linear in mlp)
    )
    head_dim = attention.query_width // attention.num_heads
    head_norms = {"": 0, "head": 2 * head_dim, "full": attention.query_width + attention.key_width}[family.head_norm]
    return LayerShape(
        linears=(*linears, *mlp),
        attention=attention,
        num_norms=family.num_norms,
        other_numel=biases + head_norms + family.num_norms * family.norm_parameters * hidden,
        has_gated_mlp="gate" in family.mlp[0],
    )


def _mlp(names: tuple[str, ...], hidden: int, size: int, *, first: int) -> Iterator[LinearShape]:
    *inputs, output = names
    for name in inputs:
        yield LinearShape(name, hidden, 2 * size if name == "gate_up_proj" else size, first)
    yield LinearShape(output, size, hidden, first + 1)


def _sparse_layer(config: Mapping[str, Any], family: Family, dense: LayerShape, lora: LoraSection) -> LayerShape:
    """Return a layer with experts in place of the MLP."""
    hidden, size = config["hidden_size"], config[family.expert_size_key]
    count = next(config[key] for key in NUM_EXPERTS_KEYS if key in config)
    attention = [linear for linear in dense.linears if linear.reads < 2]
    shared: list[LinearShape] = []
    if family.shared_expert_key:
        # PEFT maps gate and up to parts of the experts' fused matrix, so that they carry no adapter
        mlp = _mlp(family.mlp, hidden, config[family.shared_expert_key], first=2)
        gate = LinearShape("shared_expert_gate", hidden, 1, 4, is_adapted=False, is_quantized=False)
        shared = [*mlp, gate]
    adapted = lora.target_parameters == "auto"
    experts = (
        ExpertsShape("gate_up_proj", count, hidden, 2 * size, adapted),
        ExpertsShape("down_proj", count, size, hidden, adapted),
    )
    return replace(
        dense,
        linears=(*attention, *shared),
        experts=experts,
        num_experts_per_token=config["num_experts_per_tok"],
        other_numel=dense.other_numel + count * hidden,
        has_gated_mlp=bool(shared),
    )


def _is_set(config: Mapping[str, Any], value: bool | str) -> bool:
    return bool(config.get(value, False)) if isinstance(value, str) else value
