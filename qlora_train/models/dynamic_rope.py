"""Dynamic RoPE scaling with frequencies of the current batch alone.

Transformers computes the frequencies for the longest sequence since the last short one, and keeps them: outputs would
depend on earlier batches, and a resumed run would differ from an uninterrupted one.
"""

from typing import Any

from torch import nn


def reset_dynamic_rope(model: nn.Module) -> None:
    """Reset the frequencies of dynamic rotary embeddings before each forward."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.register_forward_pre_hook(_reset)


def _reset(module: Any, _arguments: tuple[Any, ...]) -> None:
    if module.max_seq_len_cached != module.original_max_seq_len:
        original = module.original_inv_freq.to(module.inv_freq.device)
        module.register_buffer("inv_freq", original, persistent=False)
        module.max_seq_len_cached = module.original_max_seq_len
