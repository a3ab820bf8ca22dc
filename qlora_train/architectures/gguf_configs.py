"""The config.json of a GGUF file, from its header. Imports no torch.

A row of `GGUF_ARCHITECTURES` says which config key each setting of a header is, and what llama.cpp computes for every
file of an architecture. Transformers' own reader ignores settings that it does not know; here such a setting refuses
the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_train.architectures import gguf_completions as completions
from qlora_train.architectures.gguf_completions import Config, expect_setting, take_setting
from qlora_train.architectures.gguf_header import GGUFHeader
from qlora_train.architectures.gguf_rope import rope_parameters
from qlora_train.utils.errors import first_line

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
    config |= {name: take_setting(header, key) for key, name in row.keys.items()}
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
    expect_setting(header, "vocab_size", num_tokens)
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {name: header.tokenizer.get(key) for name, key in names.items()}
    is_tied = not header.has("output.weight") or header.drop_copy("output.weight", "token_embd.weight")
    return {"vocab_size": num_tokens, "tie_word_embeddings": is_tied, **ids}


def _check_head_dim(header: GGUFHeader, row: GGUFArchitecture) -> int:
    head_dim: int = take_setting(header, "attention.key_length")
    expect_setting(header, "attention.value_length", head_dim)
    if "attention.key_length" not in row.keys:
        expect_setting(
            header, "attention.key_length", header.take("embedding_length") // header.take("attention.head_count")
        )
    return head_dim


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
    "llama": _Row("llama", _HEAD_DIM, complete=completions.llama),
    "qwen2": _Row("qwen2", _RMS),
    "qwen2moe": _Row("qwen2_moe", {**_RMS, **_SHARED_MOE}, {"norm_topk_prob": False}),
    "qwen3": _Row("qwen3", _HEAD_DIM),
    "qwen3moe": _Row("qwen3_moe", {**_HEAD_DIM, **_MOE}, {"norm_topk_prob": True}, complete=completions.qwen3_moe),
    "qwen35": _Row("qwen3_5_text", _QWEN3_5_KEYS, rotary="partial", complete=completions.qwen3_5),
    "qwen35moe": _Row("qwen3_5_moe_text", {**_QWEN3_5_KEYS, **_SHARED_MOE}, rotary="partial", complete=completions.qwen3_5),
    "phi3": _Row("phi3", _RMS, rotary="partial", complete=completions.phi3),
    "gemma": _Row("gemma", _HEAD_DIM),
    "gemma2": _Row("gemma2", _HEAD_DIM, complete=completions.gemma2),
    "gemma3": _Row("gemma3_text", _HEAD_DIM, complete=completions.gemma3),
    "gpt-oss": _Row(
        "gpt_oss",
        {
            **_HEAD_DIM, **_LOCAL_MOE, "expert_feed_forward_length": "intermediate_size",
            "attention.sliding_window": "sliding_window",
        },
        {"attention_bias": True}, complete=completions.gpt_oss,
    ),
    "minimax-m2": _Row(
        "minimax_m2", {**_HEAD_DIM, **_LOCAL_MOE, "expert_feed_forward_length": "intermediate_size"},
        rotary="partial", complete=completions.minimax_m2,
    ),
    "falcon": _Row(
        "falcon", _FALCON_KEYS, {"alibi": False, "bias": False, "multi_query": True, "parallel_attn": True},
        complete=completions.falcon,
    ),
    "starcoder2": _Row("starcoder2", _LAYER_NORM_GQA, {"use_bias": True, "sliding_window": None}),
    "stablelm": _Row(
        "stablelm", {**_SIZES, "attention.layer_norm_epsilon": "layer_norm_eps"}, rotary="partial",
        complete=completions.stablelm,
    ),
    "nemotron": _Row(
        "nemotron", {**_SIZES, "attention.key_length": "head_dim", "attention.layer_norm_epsilon": "norm_eps"},
        rotary="partial", complete=completions.nemotron,
    ),
    "gpt2": _Row("gpt2", _GPT2_KEYS, rotary="none"),
    "bloom": _Row("bloom", _BLOOM_KEYS, rotary="none", complete=completions.bloom),
    "lfm2": _Row(
        "lfm2",
        {
            **{key: name for key, name in _SIZES.items() if key != "attention.head_count_kv"},
            "attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache",
        },
        {"block_auto_adjust_ff_dim": False}, complete=completions.lfm2,
    ),
    "mamba": _Row("mamba", _MAMBA_KEYS, rotary="none", complete=completions.mamba),
}  # fmt: skip
"""Rows by `general.architecture`."""
GGUF_VARIANTS: dict[tuple[str, str], GGUFArchitecture] = {
    ("llama", "expert_count"): _Row("mixtral", {**_HEAD_DIM, **_LOCAL_MOE}),
    ("mamba", "ssm.dt_b_c_rms"): _Row("falcon_mamba", _MAMBA_KEYS, rotary="none", complete=completions.mamba),
}
"""Rows of files of an architecture in which a setting is not 0."""
