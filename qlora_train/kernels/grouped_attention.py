"""Attention with all scores, as Transformers' eager attention, without a copy of keys and values for each query head.

The queries of the heads that share a key head are rows of one product (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245):

    P = softmax(scaling Q K' + mask)        O = P V
    dV = P' dO      dS = P (dP - sum(dP P)),  dP = dO V'      dQ = scaling dS K      dK = scaling dS' Q

For short rows; the scores of long ones are what flash attention is for.
"""

from typing import Any

import torch
from torch import Tensor


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float
) -> Tensor:
    """Return the attention's output, (batch, seq, heads, value features).

    Args:
        query: (batch, heads, seq, features).
        key: (batch, key heads, key seq, features).
        value: (batch, key heads, key seq, value features).
        attention_mask: added to the scores, (batch, 1, seq, key seq); None adds nothing.
        scaling: factor of the scores.

    Under autocast, products are made in its dtype, as sdpa makes them, which is then the output's.
    """
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    output: Tensor = _GroupedAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), attention_mask, scaling)
    return output


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float
    ) -> Tensor:
        batch, heads, seq, _ = query.shape
        q, k, v = _rows(query, key.shape[1]), _rows(key, key.shape[1]), _rows(value, key.shape[1])
        scores = q.new_empty(len(q), q.shape[1], k.shape[1])
        if attention_mask is None:
            torch.bmm(q, k.mT, out=scores).mul_(scaling)
        else:
            scores.view(batch, heads, seq, -1).copy_(attention_mask)
            scores.baddbmm_(q, k.mT, alpha=scaling)
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape, value.shape)
        return (weights @ v).view(batch, heads, seq, -1).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, weights = ctx.saved_tensors
        shape_q, shape_k, shape_v = ctx.shapes
        grad_output = _rows(grad.transpose(1, 2), shape_k[1])
        grad_v = weights.mT @ grad_output
        grad_scores = torch._softmax_backward_data(grad_output @ v.mT, weights, -1, weights.dtype).mul_(ctx.scaling)
        grad_q, grad_k = grad_scores @ k, grad_scores.mT @ q
        return grad_q.view(shape_q), grad_k.view(shape_k), grad_v.view(shape_v), None, None


def _rows(x: Tensor, key_heads: int) -> Tensor:
    """Return (batch, heads, seq, features) as (batch * key heads, heads per key head * seq, features)."""
    return x.reshape(x.shape[0] * key_heads, -1, x.shape[-1])
