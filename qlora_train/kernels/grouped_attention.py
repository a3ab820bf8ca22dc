"""Eager attention without a copy of keys and values per query head.

The queries of the heads that share a key head are rows of one matmul (grouped-query attention, Ainslie et al. 2023,
https://arxiv.org/abs/2305.13245):

    P = softmax(scaling Q K' + mask)        O = P V
    dV = P' dO      dS = P (dP - sum(dP P)),  dP = dO V'      dQ = scaling dS K      dK = scaling dS' Q

It stores all scores, for short sequences.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float
) -> Tensor:
    """Return the attention's output, (batch, seq, heads, value features); under autocast in its dtype, as sdpa.

    Args:
        query: (batch, heads, seq, features).
        key: (batch, key heads, key seq, features).
        value: (batch, key heads, key seq, value features).
        attention_mask: added to the scores, (batch or 1, 1, seq, key seq).
    """
    output: Tensor = _GroupedAttention.apply(*in_one_dtype(query, key, value), attention_mask, scaling)
    return output


def in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three in the query's dtype, or that of autocast."""
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float
    ) -> Tensor:
        shape, key_heads = query.shape[:3], key.shape[1]
        q, k, v = (_rows(states, key_heads) for states in (query, key, value))
        output, weights = attend(q, k, v, attention_mask, scaling, shape)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape, value.shape)
        return output.view(*shape, -1).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad_output = _rows(grad.transpose(1, 2), ctx.shapes[1][1])
        grads = attend_backward(grad_output, q, k, v, weights, ctx.scaling)
        return *(each.view(shape) for each, shape in zip(grads, ctx.shapes, strict=True)), None, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the output, (n, rows, value features), and the weights, (n, rows, key seq); n is batch * key heads.

    Args:
        q: (n, rows, features); rows are heads per key head * seq.
        k: (n, key seq, features).
        v: (n, key seq, value features).
        mask: added to the scores, (batch or 1, 1, seq, key seq).
        shape: (batch, heads, seq).
    """
    scores = q.new_empty(len(q), q.shape[1], k.shape[1])
    if mask is None:
        torch.bmm(q, k.mT, out=scores).mul_(scaling)
    else:
        scores.view(*shape, -1).copy_(mask)
        scores.baddbmm_(q, k.mT, alpha=scaling)
    weights = torch.softmax(scores, -1)
    return torch.bmm(weights, v), weights


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of `attend` from that of its output."""
    grad_v = torch.bmm(weights.mT, grad)
    grad_scores = torch._softmax_backward_data(torch.bmm(grad, v.mT), weights, -1, weights.dtype).mul_(scaling)
    return torch.bmm(grad_scores, k), torch.bmm(grad_scores.mT, q), grad_v


def _rows(x: Tensor, key_heads: int) -> Tensor:
    """Return (batch, heads, seq, features) as (batch * key heads, heads per key head * seq, features)."""
    return x.reshape(x.shape[0] * key_heads, -1, x.shape[-1])
