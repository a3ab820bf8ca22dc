"""Settings of a model under the names that they had before Transformers 5, which llama.cpp's converter still asks for.

Transformers 5 reads the old names and writes the new ones. A merged folder, whose config.json it wrote, would be refused by
the converter for want of them, and the base, written years ago, would not.
"""

from collections.abc import Mapping
from typing import Any


def with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with the old names beside the new ones; what is there stays."""
    share = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    added: dict[str, Any] = {}
    if "rope_parameters" in config:
        added["rotary_pct"] = share  # gpt_neox, cohere2
    if "head_dim" in config:
        added["rotary_dim"] = int(config["head_dim"] * share)  # minimax_m2
    if "n_positions" in config:
        added["n_ctx"] = config["n_positions"]  # gpt2
    return added | dict(config)
