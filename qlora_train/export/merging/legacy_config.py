"""Add the names of Transformers 4 for settings of a config.json.

Transformers 5 reads the old names and writes the new ones. Programs that know only the old ones (Transformers 4, engines
built on it, llama.cpp's converter) silently use defaults instead: a RoPE base of 10,000 and no scaling.
"""

from collections.abc import Mapping
from typing import Any

_RENAMED_EXPERTS = ("qwen3_moe", "qwen3_vl_moe")
_NOT_SCALING = ("rope_theta", "partial_rotary_factor")


def with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with the names of Transformers 4 beside the new ones, in all sections."""
    content = {
        key: with_old_names(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    if content.get("dtype"):
        content["torch_dtype"] = content["dtype"]
    if "num_local_experts" in content and str(content.get("model_type")).startswith(_RENAMED_EXPERTS):
        content["num_experts"] = content["num_local_experts"]
    if content.get("rope_parameters"):
        content |= _old_rope(content, content["rope_parameters"])
    return content


def for_converter(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the settings that llama.cpp's converter asks for to a config.json."""
    share = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    added: dict[str, Any] = {}
    if "rope_parameters" in config:
        added["rotary_pct"] = share  # cohere2
    if "head_dim" in config:
        added["rotary_dim"] = int(config["head_dim"] * share)  # minimax_m2
    if "n_positions" in config:
        added["n_ctx"] = config["n_positions"]  # gpt2
    return added | with_old_names(config)


def _old_rope(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    if "full_attention" in rope:  # by layer type; the old setting was that of full attention
        old = _old_rope(config, rope["full_attention"])
        local = (rope.get("sliding_attention") or {}).get("rope_theta")
        return old | ({"rope_local_base_freq": local} if str(config.get("model_type")).startswith("gemma3") else {})
    scaling = {key: value for key, value in rope.items() if key not in _NOT_SCALING}
    if "original_max_position_embeddings" in config and scaling.get("rope_type") == "longrope":
        # Phi-3 allows only these three keys
        scaling = {"type": "longrope", **{key: scaling[key] for key in ("short_factor", "long_factor")}}
    old = {key: rope[key] for key in _NOT_SCALING if rope.get(key) is not None}
    if str(config.get("model_type")).startswith("gpt_neox"):
        old |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    # null would overrule the new names
    return old if scaling == {"rope_type": "default"} else {**old, "rope_scaling": scaling}
