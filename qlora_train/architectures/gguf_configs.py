"""The config.json of a GGUF file, from its header. Imports no torch.

A row of `GGUF_ARCHITECTURES` says which config key each setting of a header is, and what llama.cpp computes for every
file of an architecture. Transformers' own reader ignores settings that it does not know; here such a setting refuses
the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_train.architectures.gguf_header import GGUFHeader
from qlora_train.architectures.gguf_rope import rope_parameters
from qlora_train.utils.errors import first_line

Config = dict[str, Any]

_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_RMS = {**_SIZES, "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_HEAD_DIM = {**_RMS, "attention.key_length": "head_dim"}
_MOE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_SHARED_MOE = {**_MOE, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_LOCAL_MOE = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_DEFAULTS: Mapping[str, Callable[[GGUFHeader], Any]] = {
    "attention.head_count_kv": lambda header: header.take("attention.head_count"),
    "attention.key_length": lambda header: header.take("embedding_length") // header.take("attention.head_count"),
    "attention.value_length": lambda header: _take(header, "attention.key_length"),
    "expert_feed_forward_length": lambda header: header.shape("blk.0.ffn_up_exps.weight")[1],
    "expert_shared_feed_forward_length": lambda header: header.shape("blk.0.ffn_up_shexp.weight")[0],
}
"""What llama.cpp assumes for a missing setting."""
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_used_count": (0,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("Meta AI original pth", "jploski"),
}
"""Settings that change nothing if they have one of these values."""


MAX_QUOTED = 40


@dataclass(frozen=True)
class GGUFArchitecture:
    """How Transformers describes the models of a GGUF architecture.

    Attributes:
        model_type: in config.json.
        keys: setting -> key of config.json.
        fixed: keys of config.json that no setting has.
        rotary: how much of each head is rotated.
        complete: adds to the config what single keys cannot express.
    """

    model_type: str
    keys: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rotary: str = "whole"
    complete: Callable[[GGUFHeader, Config], None] | None = None


def gguf_config(header: GGUFHeader) -> Config:
    """Return the content of config.json.

    Raises:
        ModelError: an unsupported architecture, or a setting that is missing, would be lost, or is of another type.
    """
    try:
        return _config(header)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise header.refused(f"has settings of another type or size than llama.cpp writes ({reason})") from None


def _config(header: GGUFHeader) -> Config:
    row = _row(header)
    config: Config = {"model_type": row.model_type, **_vocabulary(header), **row.fixed}
    config |= {name: _take(header, key) for key, name in row.keys.items()}
    for name, value in config.items():
        if name.startswith("num_") and not isinstance(value, int | list):
            raise TypeError(f"{name}: {str(value)[:MAX_QUOTED]!r}")
    if row.rotary != "none":
        head_dim = _check_head_dim(header, row)
        config["rope_parameters"] = rope_parameters(header, head_dim, partial=row.rotary == "partial")
    if row.complete is not None:
        row.complete(header, config)
    lost = [
        f"{header.architecture}.{key}: {value}"
        for key, value in header.unread_settings().items()
        if value not in _WITHOUT_EFFECT.get(key, ())
    ]
    if lost:
        raise header.refused(f"sets {', '.join(lost)}, which would be lost in the conversion")
    return config


_ENCODER = "it has an encoder, and this package trains decoders"
_NOT_CONVERTED = {
    "t5": _ENCODER,
    "t5encoder": _ENCODER,
    "deci": "its layers differ in size, and Transformers has no such models",
    "gemma4": "its checkpoints are trained as multimodal ones (docs/architectures.md), and a file has the text model alone",
}
"""Architectures that Transformers' reader knows and that are refused, and why."""


def _row(header: GGUFHeader) -> GGUFArchitecture:
    for (architecture, key), row in GGUF_VARIANTS.items():
        if header.architecture == architecture and header.settings.get(key):
            return row
    if reason := _NOT_CONVERTED.get(header.architecture):
        raise header.refused(f"holds the GGUF architecture {header.architecture!r}: {reason}")
    if header.architecture not in GGUF_ARCHITECTURES:
        raise header.refused(
            f"holds the GGUF architecture {header.architecture!r}; converted are {', '.join(GGUF_ARCHITECTURES)}"
        )
    return GGUF_ARCHITECTURES[header.architecture]


def _vocabulary(header: GGUFHeader) -> Config:
    num_tokens = header.shape("token_embd.weight")[0]
    _expect(header, "vocab_size", num_tokens)
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {name: header.tokenizer.get(key) for name, key in names.items()}
    is_tied = not header.has("output.weight") or header.drop_copy("output.weight", "token_embd.weight")
    return {"vocab_size": num_tokens, "tie_word_embeddings": is_tied, **ids}


def _take(header: GGUFHeader, key: str) -> Any:
    if key in _DEFAULTS and key not in header.settings:
        return _DEFAULTS[key](header)
    return header.take(key)


def _expect(header: GGUFHeader, key: str, value: Any) -> None:
    """Refuse another value of a setting than the one that the rest of the file implies."""
    if (found := header.take(key, value)) != value:
        raise header.refused(f"sets {header.architecture}.{key}: {found}, where Transformers computes with {value}")


def _check_head_dim(header: GGUFHeader, row: GGUFArchitecture) -> int:
    head_dim: int = _take(header, "attention.key_length")
    _expect(header, "attention.value_length", head_dim)
    if "attention.key_length" not in row.keys:
        _expect(header, "attention.key_length", header.take("embedding_length") // header.take("attention.head_count"))
    return head_dim


def _sliding_layers(header: GGUFHeader, config: Config, period: int) -> None:
    """Set the kind of each layer: the last of every `period` layers attends to all tokens."""
    pattern = header.take_list("attention.sliding_window_pattern", period)
    num_layers = config["num_hidden_layers"]
    if not isinstance(pattern, list):
        pattern = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]


def _llama(header: GGUFHeader, config: Config) -> None:
    config["attention_bias"] = header.has("blk.0.attn_q.bias")
    config["mlp_bias"] = header.has("blk.0.ffn_up.bias")


def _falcon(header: GGUFHeader, config: Config) -> None:
    config["new_decoder_architecture"] = config["num_kv_heads"] > 1
    config["num_ln_in_parallel_attn"] = 2 if header.has("blk.0.attn_norm_2.weight") else 1


def _phi3(header: GGUFHeader, config: Config) -> None:
    original = header.take("rope.scaling.original_context_length", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = original
    config["sliding_window"] = header.take("attention.sliding_window", 0) or None


def _stablelm(header: GGUFHeader, config: Config) -> None:
    config["use_qkv_bias"] = header.has("blk.0.attn_q.bias")
    config["qk_layernorm"] = header.has("blk.0.attn_q_norm.weight")
    config["use_parallel_residual"] = not header.has("blk.0.ffn_norm.weight")
    _expect(header, "use_parallel_residual", config["use_parallel_residual"])


def _bloom(header: GGUFHeader, config: Config) -> None:
    _expect(header, "feed_forward_length", 4 * config["hidden_size"])
    _expect(header, "attention.head_count_kv", config["n_head"])


def _nemotron(header: GGUFHeader, _config: Config) -> None:
    header.take("attention.layer_norm_rms_epsilon", None)  # the same number under a second name


def _mamba(header: GGUFHeader, config: Config) -> None:
    config["intermediate_size"] = header.take("ssm.inner_size")
    config["expand"] = config["intermediate_size"] // config["hidden_size"]
    config["use_conv_bias"] = header.has("blk.0.ssm_conv1d.bias")
    config["use_bias"] = header.has("blk.0.ssm_in.bias")
    _expect(header, "feed_forward_length", 0)
    _expect(header, "attention.head_count", 0)
    _expect(header, "ssm.dt_b_c_rms", config["model_type"] == "falcon_mamba")


def _gemma_scale(config: Config, num_layers_of_27b: int) -> None:
    """Set the attention scale, which llama.cpp derives from the number of layers."""
    is_27b = config["num_hidden_layers"] == num_layers_of_27b
    per_head = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = per_head if is_27b else config["head_dim"]


def _gemma2(header: GGUFHeader, config: Config) -> None:
    _gemma_scale(config, num_layers_of_27b=46)
    config["sliding_window"] = header.take("attention.sliding_window", 4096)
    config["attn_logit_softcapping"] = header.take("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = header.take("final_logit_softcapping", 30.0)
    _sliding_layers(header, config, period=2)


def _gemma3(header: GGUFHeader, config: Config) -> None:
    _gemma_scale(config, num_layers_of_27b=62)
    config["final_logit_softcapping"] = header.take("final_logit_softcapping", 0.0) or None
    window = header.take("attention.sliding_window", 0)
    config |= {"sliding_window": window} if window else {}
    _sliding_layers(header, config, period=6 if window else 1)
    sliding = {"rope_type": "default", "rope_theta": header.take("rope.freq_base_swa", 10000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": sliding}


def _minimax_m2(header: GGUFHeader, config: Config) -> None:
    _expect(header, "expert_gating_func", 2)  # sigmoid
    _expect(header, "feed_forward_length", config["intermediate_size"])


def _qwen3_moe(header: GGUFHeader, _config: Config) -> None:
    header.take("expert_shared_feed_forward_length", None)  # of a shared expert, which these models do not have


def _gpt_oss(header: GGUFHeader, config: Config) -> None:
    _sliding_layers(header, config, period=2)
    _expect(header, "feed_forward_length", config["intermediate_size"])
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False  # in every gpt-oss, and in no file


def _lfm2(header: GGUFHeader, config: Config) -> None:
    per_layer = header.take_list("attention.head_count_kv")
    if not isinstance(per_layer, list):
        per_layer = [per_layer] * config["num_hidden_layers"]
    config["num_key_value_heads"] = max(per_layer)
    config["layer_types"] = ["full_attention" if num_heads else "conv" for num_heads in per_layer]
    config["conv_bias"] = header.has(f"blk.{config['layer_types'].index('conv')}.shortconv.in_proj.bias")


def _qwen3_5(header: GGUFHeader, config: Config) -> None:
    config["num_hidden_layers"] -= header.take("nextn_predict_layers", 0)
    interval = header.take("full_attention_interval")
    kinds = ["full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(10**4)]
    config["layer_types"] = kinds[: config["num_hidden_layers"]]
    config["linear_value_head_dim"] = header.take("ssm.inner_size") // config["linear_num_value_heads"]
    sections = [size for size in header.take_list("rope.dimension_sections") if size]
    config["rope_parameters"] |= {"mrope_section": sections, "mrope_interleaved": True}


_LAYER_NORM_GQA = {**_SIZES, "attention.layer_norm_epsilon": "norm_epsilon"}
_MAMBA_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
    "ssm.time_step_rank": "time_step_rank",
}
_QWEN3_5_KEYS = {
    **_HEAD_DIM,
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
_GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_BLOOM_KEYS = {
    "block_count": "n_layer",
    "context_length": "seq_length",
    "embedding_length": "hidden_size",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_FALCON_KEYS = {
    **_SIZES,
    "feed_forward_length": "ffn_hidden_size",
    "attention.head_count_kv": "num_kv_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}

_Row = GGUFArchitecture
GGUF_ARCHITECTURES: dict[str, GGUFArchitecture] = {
    "llama": _Row("llama", _HEAD_DIM, complete=_llama),
    "qwen2": _Row("qwen2", _RMS),
    "qwen2moe": _Row("qwen2_moe", {**_RMS, **_SHARED_MOE}, {"norm_topk_prob": False}),
    "qwen3": _Row("qwen3", _HEAD_DIM),
    "qwen3moe": _Row("qwen3_moe", {**_HEAD_DIM, **_MOE}, {"norm_topk_prob": True}, complete=_qwen3_moe),
    "qwen35": _Row("qwen3_5_text", _QWEN3_5_KEYS, rotary="partial", complete=_qwen3_5),
    "qwen35moe": _Row("qwen3_5_moe_text", {**_QWEN3_5_KEYS, **_SHARED_MOE}, rotary="partial", complete=_qwen3_5),
    "phi3": _Row("phi3", _RMS, rotary="partial", complete=_phi3),
    "gemma": _Row("gemma", _HEAD_DIM),
    "gemma2": _Row("gemma2", _HEAD_DIM, complete=_gemma2),
    "gemma3": _Row("gemma3_text", _HEAD_DIM, complete=_gemma3),
    "gpt-oss": _Row(
        "gpt_oss",
        {
            **_HEAD_DIM, **_LOCAL_MOE, "expert_feed_forward_length": "intermediate_size",
            "attention.sliding_window": "sliding_window",
        },
        {"attention_bias": True}, complete=_gpt_oss,
    ),
    "minimax-m2": _Row(
        "minimax_m2", {**_HEAD_DIM, **_LOCAL_MOE, "expert_feed_forward_length": "intermediate_size"},
        rotary="partial", complete=_minimax_m2,
    ),
    "falcon": _Row(
        "falcon", _FALCON_KEYS, {"alibi": False, "bias": False, "multi_query": True, "parallel_attn": True},
        complete=_falcon,
    ),
    "starcoder2": _Row("starcoder2", _LAYER_NORM_GQA, {"use_bias": True, "sliding_window": None}),
    "stablelm": _Row(
        "stablelm", {**_SIZES, "attention.layer_norm_epsilon": "layer_norm_eps"}, rotary="partial", complete=_stablelm
    ),
    "nemotron": _Row(
        "nemotron", {**_SIZES, "attention.key_length": "head_dim", "attention.layer_norm_epsilon": "norm_eps"},
        rotary="partial", complete=_nemotron,
    ),
    "gpt2": _Row("gpt2", _GPT2_KEYS, rotary="none"),
    "bloom": _Row("bloom", _BLOOM_KEYS, rotary="none", complete=_bloom),
    "lfm2": _Row(
        "lfm2",
        {
            **{key: name for key, name in _SIZES.items() if key != "attention.head_count_kv"},
            "attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache",
        },
        {"block_auto_adjust_ff_dim": False}, complete=_lfm2,
    ),
    "mamba": _Row("mamba", _MAMBA_KEYS, rotary="none", complete=_mamba),
}  # fmt: skip
"""Rows by `general.architecture`."""
GGUF_VARIANTS: dict[tuple[str, str], GGUFArchitecture] = {
    ("llama", "expert_count"): _Row("mixtral", {**_HEAD_DIM, **_LOCAL_MOE}),
    ("mamba", "ssm.dt_b_c_rms"): _Row("falcon_mamba", _MAMBA_KEYS, rotary="none", complete=_mamba),
}
"""Rows of files of an architecture in which a setting is not 0."""
