"""What single settings of a GGUF header cannot express in config.json, by architecture. Imports no torch.

Each function completes a config from the header. They follow what llama.cpp computes for every file of the architecture.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qlora_train.architectures.gguf_header import GGUFHeader

Config = dict[str, Any]

_DEFAULTS: Mapping[str, Callable[[GGUFHeader], Any]] = {
    "attention.head_count_kv": lambda header: header.take("attention.head_count"),
    "attention.key_length": lambda header: header.take("embedding_length") // header.take("attention.head_count"),
    "attention.value_length": lambda header: take_setting(header, "attention.key_length"),
    "expert_feed_forward_length": lambda header: header.shape("blk.0.ffn_up_exps.weight")[1],
    "expert_shared_feed_forward_length": lambda header: header.shape("blk.0.ffn_up_shexp.weight")[0],
}
"""What llama.cpp assumes for a missing setting."""


def take_setting(header: GGUFHeader, key: str) -> Any:
    """Return a setting, or what llama.cpp assumes where it is missing."""
    if key in _DEFAULTS and key not in header.settings:
        return _DEFAULTS[key](header)
    return header.take(key)


def expect_setting(header: GGUFHeader, key: str, value: Any) -> None:
    """Refuse another value of a setting than the one that the rest of the file implies."""
    if (found := header.take(key, value)) != value:
        raise header.refused(f"sets {header.architecture}.{key}: {found}, where Transformers computes with {value}")


def _sliding_layers(header: GGUFHeader, config: Config, period: int) -> None:
    """Set the kind of each layer: the last of every `period` layers attends to all tokens."""
    pattern = header.take_list("attention.sliding_window_pattern", period)
    num_layers = config["num_hidden_layers"]
    if not isinstance(pattern, list):
        pattern = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]


def llama(header: GGUFHeader, config: Config) -> None:
    config["attention_bias"] = header.has("blk.0.attn_q.bias")
    config["mlp_bias"] = header.has("blk.0.ffn_up.bias")


def falcon(header: GGUFHeader, config: Config) -> None:
    config["new_decoder_architecture"] = config["num_kv_heads"] > 1
    config["num_ln_in_parallel_attn"] = 2 if header.has("blk.0.attn_norm_2.weight") else 1


def phi3(header: GGUFHeader, config: Config) -> None:
    original = header.take("rope.scaling.original_context_length", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = original
    config["sliding_window"] = header.take("attention.sliding_window", 0) or None


def stablelm(header: GGUFHeader, config: Config) -> None:
    config["use_qkv_bias"] = header.has("blk.0.attn_q.bias")
    config["qk_layernorm"] = header.has("blk.0.attn_q_norm.weight")
    config["use_parallel_residual"] = not header.has("blk.0.ffn_norm.weight")
    expect_setting(header, "use_parallel_residual", config["use_parallel_residual"])


def bloom(header: GGUFHeader, config: Config) -> None:
    expect_setting(header, "feed_forward_length", 4 * config["hidden_size"])
    expect_setting(header, "attention.head_count_kv", config["n_head"])


def nemotron(header: GGUFHeader, _config: Config) -> None:
    header.take("attention.layer_norm_rms_epsilon", None)  # the same number under a second name


def mamba(header: GGUFHeader, config: Config) -> None:
    config["intermediate_size"] = header.take("ssm.inner_size")
    config["expand"] = config["intermediate_size"] // config["hidden_size"]
    config["use_conv_bias"] = header.has("blk.0.ssm_conv1d.bias")
    config["use_bias"] = header.has("blk.0.ssm_in.bias")
    expect_setting(header, "feed_forward_length", 0)
    expect_setting(header, "attention.head_count", 0)
    expect_setting(header, "ssm.dt_b_c_rms", config["model_type"] == "falcon_mamba")


def _gemma_scale(config: Config, num_layers_of_27b: int) -> None:
    """Set the attention scale, which llama.cpp derives from the number of layers."""
    is_27b = config["num_hidden_layers"] == num_layers_of_27b
    per_head = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = per_head if is_27b else config["head_dim"]


def gemma2(header: GGUFHeader, config: Config) -> None:
    _gemma_scale(config, num_layers_of_27b=46)
    config["sliding_window"] = header.take("attention.sliding_window", 4096)
    config["attn_logit_softcapping"] = header.take("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = header.take("final_logit_softcapping", 30.0)
    _sliding_layers(header, config, period=2)


def gemma3(header: GGUFHeader, config: Config) -> None:
    _gemma_scale(config, num_layers_of_27b=62)
    config["final_logit_softcapping"] = header.take("final_logit_softcapping", 0.0) or None
    window = header.take("attention.sliding_window", 0)
    config |= {"sliding_window": window} if window else {}
    _sliding_layers(header, config, period=6 if window else 1)
    sliding = {"rope_type": "default", "rope_theta": header.take("rope.freq_base_swa", 10000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": sliding}


def minimax_m2(header: GGUFHeader, config: Config) -> None:
    expect_setting(header, "expert_gating_func", 2)  # sigmoid
    expect_setting(header, "feed_forward_length", config["intermediate_size"])


def qwen3_moe(header: GGUFHeader, _config: Config) -> None:
    header.take("expert_shared_feed_forward_length", None)  # of a shared expert, which these models do not have


def gpt_oss(header: GGUFHeader, config: Config) -> None:
    _sliding_layers(header, config, period=2)
    expect_setting(header, "feed_forward_length", config["intermediate_size"])
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False  # in every gpt-oss, and in no file


def lfm2(header: GGUFHeader, config: Config) -> None:
    per_layer = header.take_list("attention.head_count_kv")
    if not isinstance(per_layer, list):
        per_layer = [per_layer] * config["num_hidden_layers"]
    config["num_key_value_heads"] = max(per_layer)
    config["layer_types"] = ["full_attention" if num_heads else "conv" for num_heads in per_layer]
    config["conv_bias"] = header.has(f"blk.{config['layer_types'].index('conv')}.shortconv.in_proj.bias")


def qwen3_5(header: GGUFHeader, config: Config) -> None:
    config["num_hidden_layers"] -= header.take("nextn_predict_layers", 0)
    interval = header.take("full_attention_interval")
    kinds = ["full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(10**4)]
    config["layer_types"] = kinds[: config["num_hidden_layers"]]
    config["linear_value_head_dim"] = header.take("ssm.inner_size") // config["linear_num_value_heads"]
    sections = [size for size in header.take_list("rope.dimension_sections") if size]
    config["rope_parameters"] |= {"mrope_section": sections, "mrope_interleaved": True}
