"""Attention over documents that are packed into one row: each attends to itself alone, and no mask of the row is made.

Transformers tells documents apart by positions that restart at 0, and describes who sees whom by a function of two
places in the row. Its own kernels make a mask of (tokens, tokens) of it and compute every pair. Here the row is cut at
its documents and each is computed by itself: the cost is the sum of their squared lengths, and a document that is plainly
causal runs without any mask. A document longer than a sliding window gets a mask of its own length.

A row that is not packed (it has padding, or is one document) goes through Transformers' sdpa unchanged. Soft-capped
scores, which sdpa cannot do, are computed as Transformers' eager attention does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "packed_documents"
"""What a model's attention is called while it trains on packs."""

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query place, key place), broadcast, -> whether the query sees the key."""


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a row, in order: where each begins and ends, and its mask, None for a plainly causal one."""

    spans: tuple[tuple[int, int], ...]
    masks: tuple[torch.Tensor | None, ...]
    """Boolean, (1, 1, length, length)."""


def register() -> None:
    """Make both functions known to Transformers under NAME, through its public interfaces."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, find_documents)


def find_documents(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device,
    **others: Any,
) -> Documents | torch.Tensor | None:
    """Return the documents of a packed row; of any other input, what sdpa is given as its mask.

    Called once a forward for each kind of layer, with the arguments of Transformers' own mask functions. An input is a
    packed row when it is one row without a padding mask whose mask function may not be replaced by plain causality.
    """
    is_row = batch_size == 1 and attention_mask is None and q_length == kv_length
    if not is_row or allow_is_causal_skip or use_vmap:
        return AttentionMaskInterface()["sdpa"](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap,
            device=device,
            **others,
        )
    places, zero = torch.arange(q_length, device=device), torch.zeros((), dtype=torch.long, device=device)
    sees_previous = mask_function(zero, zero, places[1:], places[:-1])
    begins = [0, *((~sees_previous).nonzero().flatten() + 1).tolist()]
    spans = tuple(zip(begins, [*begins[1:], q_length], strict=True))

    def mask_of(begin: int, end: int) -> torch.Tensor | None:
        if local_size is None or end - begin <= local_size:
            return None
        own = places[begin:end]
        return mask_function(zero, zero, own[:, None], own[None, :])[None, None]

    return Documents(spans, tuple(mask_of(*span) for span in spans))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Documents | torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of one layer.

    Args:
        module: the layer's attention module.
        query: (batch, heads, seq, head_dim).
        key: (batch, key_value_heads, seq, head_dim).
        value: (batch, key_value_heads, seq, head_dim).
        attention_mask: from `find_documents`.
        options: what the model hands to every attention function: `scaling`, `dropout`, `softcap`, ...

    Returns:
        (batch, seq, heads, head_dim), and None instead of attention weights.
    """
    compute = AttentionInterface()["sdpa"] if options.get("softcap") is None else soft_capped_attention
    if not isinstance(attention_mask, Documents):
        return compute(module, query, key, value, attention_mask, **options)
    outputs = [
        compute(module, query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end], mask, **options)[0]
        for (begin, end), mask in zip(attention_mask.spans, attention_mask.masks, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def soft_capped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    softcap: float,
    scaling: float,
    dropout: float = 0.0,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with scores softcap * tanh(scores / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118).

    Shapes are those of `attend`; `attention_mask` is boolean, (batch, 1, seq, key seq), or None for causal attention. The
    order of operations and the dtypes are those of Transformers' eager attention.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is None:
        seen_before = key.shape[2] - query.shape[2]
        attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(seen_before)
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None
