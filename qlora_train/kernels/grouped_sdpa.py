"""Transformers' sdpa, with keys and values repeated if no fused kernel supports grouped-query attention.

Transformers passes `enable_gqa=True` whenever there is no mask. Of torch's fused kernels only FlashAttention and cuDNN
support it (memory-efficient attention from torch 2.14 on), on sm_80 or later and in 16 bits. Elsewhere, as on a T4 or in
float32, torch uses the math kernel, which stores (seq, seq) scores per head. Repeated keys and values cost
heads / key heads times their own size, and memory-efficient attention supports them.
"""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.backends import cuda
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_train.kernels.grouped_attention import in_one_dtype


def register() -> None:
    """Register `attend` with Transformers as sdpa."""
    AttentionInterface.register("sdpa", attend)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention with the arguments and results of Transformers' `sdpa_attention_forward`."""
    caller: Any = module
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and attention_mask is None and needs_repeated_keys(query, key, value, options):
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        caller = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # without num_key_value_groups
    output: tuple[Tensor, None] = sdpa_attention_forward(caller, query, key, value, attention_mask, **options)
    return output


def needs_repeated_keys(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Return whether no fused kernel of this GPU supports grouped queries, (batch, heads, seq, head_dim)."""
    if not query.is_cuda:
        return False
    q, k, v = in_one_dtype(query, key, value)  # as autocast does inside sdpa
    params = cuda.SDPAParams(q, k, v, options.get("position_bias"), options.get("dropout", 0.0), False, True)
    kernels = cuda.can_use_flash_attention, cuda.can_use_cudnn_attention, cuda.can_use_efficient_attention
    return not any(supports(params) for supports in kernels)
