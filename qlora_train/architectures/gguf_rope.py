"""RoPE settings of a GGUF file: in its header, or in tensors with a factor per frequency. Imports no torch."""

import math
from typing import Any

from qlora_train.architectures.gguf_header import GGUFHeader

LLAMA3_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""RoPE settings of Llama 3.1 to 3.3, whose GGUF files hold only the factors computed from them."""
LONGROPE_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
_DEFAULT_THETA = 10000.0
"""llama.cpp's RoPE base for a file without one."""
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


def rope_parameters(header: GGUFHeader, head_dim: int, *, partial: bool) -> dict[str, Any]:
    """Return `rope_parameters` of config.json.

    Args:
        partial: whether the architecture can rotate a part of a head.

    Raises:
        ModelError: settings that Transformers would not compute alike.
    """
    theta = header.take("rope.freq_base", _DEFAULT_THETA)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    num_rotated = header.take("rope.dimension_count", head_dim)
    if partial:
        rope["partial_rotary_factor"] = num_rotated / head_dim
    elif num_rotated != head_dim:
        raise header.refused(
            f"sets {header.architecture}.rope.dimension_count: {num_rotated}, which would be lost in the conversion"
        )
    if header.has(LLAMA3_FACTORS):
        return rope | _llama3(header, theta, num_rotated)
    if header.has(LONGROPE_FACTORS["long_factor"]):
        return rope | _longrope(header)
    return rope | _scaling(header)


def _scaling(header: GGUFHeader) -> dict[str, Any]:
    kind = header.take("rope.scaling.type", "none")
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise header.refused(
            f"sets {header.architecture}.rope.scaling.type: {kind}, which would be lost in the conversion"
        )
    rope = {"rope_type": kind, "factor": header.take("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = header.take("rope.scaling.original_context_length")
        keys = {key: name for key, name in _YARN.items() if f"rope.scaling.{key}" in header.settings}
        rope |= {name: header.take(f"rope.scaling.{key}") for key, name in keys.items()}
    return rope


def _llama3(header: GGUFHeader, theta: float, num_rotated: int) -> dict[str, Any]:
    """Return the settings that give the factors of the file, one per frequency."""
    factors = header.values(LLAMA3_FACTORS)
    factor = max(factors)
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]

    def expected(index: int) -> float:
        frequency = theta ** -(2 * index / num_rotated)
        num_rotations = LLAMA3_ROPE["original_max_position_embeddings"] * frequency / (2 * math.pi)
        smooth = min(max((num_rotations - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - smooth) / factor + smooth)

    known = [expected(index) for index in range(num_rotated // 2)]
    if len(factors) != len(known) or not all(map(lambda a, b: math.isclose(a, b, rel_tol=1e-4), factors, known)):
        raise header.refused(f"holds rope factors ({LLAMA3_FACTORS}) that are not those of Llama 3.1 to 3.3")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}


def _longrope(header: GGUFHeader) -> dict[str, Any]:
    original = header.take("rope.scaling.original_context_length")
    factors = {key: header.values(tensor) for key, tensor in LONGROPE_FACTORS.items()}
    attention_factor = header.take("rope.scaling.attn_factor")
    header.take("rope.scaling.type", "longrope")
    return {
        "rope_type": "longrope", "original_max_position_embeddings": original, "attention_factor": attention_factor,
        **factors,
    }  # fmt: skip
