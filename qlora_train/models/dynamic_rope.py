"""Dynamic RoPE scaling whose frequencies depend on the batch at hand, and on no earlier one.

Transformers computes the frequencies for the longest row since it last saw a short one, and keeps them: what a row gives
would depend on the rows before it, and a resumed run would differ from one that was not stopped.
"""

from typing import Any

from torch import nn


def reset_dynamic_rope(model: nn.Module) -> None:
    """Let every forward of a dynamic rotary embedding begin with the frequencies of the base."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.register_forward_pre_hook(_reset)


def _reset(module: Any, _arguments: tuple[Any, ...]) -> None:
    if module.max_seq_len_cached != module.original_max_seq_len:
        original = module.original_inv_freq.to(module.inv_freq.device)
        module.register_buffer("inv_freq", original, persistent=False)
        module.max_seq_len_cached = module.original_max_seq_len
