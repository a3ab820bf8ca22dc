"""Attention over documents that are packed into one row: each attends to itself alone, and no mask of the row is made.

Transformers tells documents apart by positions that restart at 0, and describes who sees whom by a function of two
places in the row. Its own kernels make a mask of (tokens, tokens) of it and compute every pair. Here the row is cut at
its documents: the cost is the sum of their squared lengths, and a document that is plainly causal runs without any mask.
Documents of similar length are computed together, padded on the right, where causality hides the padding. A document
longer than a sliding window is computed by itself, with a mask of its own length.

A row that is not packed (it has padding, or is one document) goes through Transformers' sdpa unchanged. Soft-capped
scores, which sdpa cannot do, are computed as Transformers' eager attention does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "packed_documents"
"""What a model's attention is called while it trains on packs."""

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query place, key place), broadcast, -> whether the query sees the key."""


SHORTEST_SHARE = 0.75
"""Of the longest document of a batch: what is shorter goes to the next batch, which bounds the padding."""


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """Documents that are computed together: how many, the length of the longest, and their mask, None for plain causality.

    A mask is boolean, (1, 1, length, length), and that of a single document.
    """

    num_documents: int
    length: int
    mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a row in batches, which lie one behind the other, padding included.

    Attributes:
        batches: the batches.
        places: the token of the row at each place of the batches, int64; 0 for padding.
        back: the place of each token of the row in the batches, int64 (seq,).
    """

    batches: tuple[DocumentBatch, ...]
    places: torch.Tensor
    back: torch.Tensor


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

    def mask_of(begin: int, end: int) -> torch.Tensor:
        own = places[begin:end]
        return mask_function(zero, zero, own[:, None], own[None, :])[None, None]

    spans = zip(begins, [*begins[1:], q_length], strict=True)
    return _in_batches(sorted(spans, key=lambda span: span[0] - span[1]), local_size, mask_of, device)


def _in_batches(
    spans: Sequence[tuple[int, int]],
    local_size: int | None,
    mask_of: Callable[[int, int], torch.Tensor],
    device: torch.device,
) -> Documents:
    """Return documents, the longest first, in batches."""
    batches: list[DocumentBatch] = []
    found: list[torch.Tensor] = []
    back = torch.empty(sum(end - begin for begin, end in spans), dtype=torch.long)
    size, first = 0, 0
    while first < len(spans):
        begin, end = spans[first]
        length = end - begin
        masked = local_size is not None and length > local_size
        last = first + 1
        while not masked and last < len(spans) and spans[last][1] - spans[last][0] >= SHORTEST_SHARE * length:
            last += 1
        for own_begin, own_end in spans[first:last]:
            own = torch.arange(own_begin, own_end)
            found.append(functional.pad(own, (0, length - len(own))))
            back[own_begin:own_end] = torch.arange(size, size + len(own))
            size += length
        batches.append(DocumentBatch(last - first, length, mask_of(begin, end) if masked else None))
        first = last
    return Documents(tuple(batches), torch.cat(found).to(device), back.to(device))


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
    sizes = [batch.num_documents * batch.length for batch in attention_mask.batches]

    def parts(states: torch.Tensor) -> list[torch.Tensor]:
        """Return (1, heads, seq, head_dim) as (documents, heads, length, head_dim) of each batch."""
        rows = _Spread.apply(states[0].transpose(0, 1), attention_mask.places, attention_mask.back)
        each = zip(rows.split(sizes), attention_mask.batches, strict=True)
        return [part.unflatten(0, (batch.num_documents, batch.length)).transpose(1, 2) for part, batch in each]

    each = zip(parts(query), parts(key), parts(value), attention_mask.batches, strict=True)
    outputs = [compute(module, q, k, v, batch.mask, **options)[0].flatten(0, 1) for q, k, v, batch in each]
    together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _Collect.apply(together, attention_mask.places, attention_mask.back)[None], None


class _Spread(torch.autograd.Function):
    """Rows of a pack -> rows of its batches. No gradient comes from padding, whose results nobody reads."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class _Collect(torch.autograd.Function):
    """Rows of the batches of a pack -> rows of the pack."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.num_rows = len(places)
        return rows.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, back, grad), None, None


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
