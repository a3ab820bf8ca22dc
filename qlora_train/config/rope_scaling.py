"""Supported RoPE scalings and their keys."""

from collections.abc import Mapping

KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Required numbers; the base frequency comes from the checkpoint."""
REFUSED = {"longrope": "longrope needs a factor per frequency, which only checkpoints trained with it have"}


def check_rope_scaling(scaling: Mapping[str, str | int | float]) -> None:
    """Check `model.rope_scaling`.

    Raises:
        ValueError: the type is not supported, or one of its keys is missing or out of range.
    """
    if not {"rope_type", "factor"} <= scaling.keys():
        raise ValueError("rope_scaling needs rope_type and factor, e.g. {rope_type: linear, factor: 2.0}")
    kind = str(scaling["rope_type"])
    if kind not in KEYS:
        reason = REFUSED.get(kind, f"unknown {kind!r}")
        raise ValueError(f"rope_scaling rope_type: {reason}; allowed: {', '.join(KEYS)}")
    missing = [key for key in KEYS[kind] if key not in scaling]
    if missing:
        raise ValueError(f"rope_scaling rope_type {kind} needs {', '.join(missing)} too; take them from a config.json")
    for key in KEYS[kind]:
        value = scaling[key]
        if isinstance(value, str) or value <= 0:
            raise ValueError(f"rope_scaling {key} is {value!r}; allowed: a number > 0")
    if float(scaling["factor"]) < 1:
        raise ValueError(f"rope_scaling factor is {scaling['factor']!r}; allowed: a number >= 1, e.g. 2.0")
    if kind == "llama3" and float(scaling["high_freq_factor"]) <= float(scaling["low_freq_factor"]):
        raise ValueError(
            f"rope_scaling high_freq_factor is {scaling['high_freq_factor']}; allowed: more than low_freq_factor, which is "
            f"{scaling['low_freq_factor']}"
        )
