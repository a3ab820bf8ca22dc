"""Attention over documents that are laid into one row: each attends to itself alone, and no mask of the row is made.

Transformers tells documents apart by positions that restart at 0, and describes who sees whom by a function of two
places in the row. Its own kernels make a mask of (tokens, tokens) of it and compute every pair. Here the row is cut at
its documents: the cost is the sum of their squared lengths, and a document that is plainly causal runs without any mask.
On a GPU one kernel takes documents of any lengths (`document_varlen`), sliding windows included. Elsewhere, and where it
does not apply, documents of similar length are computed together, padded on the right, where causality hides the padding. A
document longer than a sliding window is then computed by itself, with a mask of its own length.

Documents that begin alike need their beginning once. One whose positions begin at p > 0 goes on where the first p tokens
of the row's last document that begins at 0 end: it attends to these and to itself, as if it stood behind them. What a
decoder computes of them is the same in both, and their gradient is the sum over all documents that begin with them.

A row that is not packed (it has padding, or is one document) goes through Transformers' sdpa unchanged. Soft-capped
scores, which sdpa cannot do, are computed as Transformers' eager attention does.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from qlora_train.kernels import host_copies
from qlora_train.kernels.packed import varlen
from qlora_train.kernels.packed.eager_scores import Layout, Places, scored_documents
from qlora_train.kernels.packed.row_layout import Collect, Shared, Span, Spread, shared_of
from qlora_train.kernels.packed.varlen import CAUSAL, Lengths, Window, varlen_documents

NAME = "packed_documents"
"""What a model's attention is called while it trains on packs."""

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query place, key place), broadcast, -> whether the query sees the key."""


SHORTEST_SHARE = 0.75
"""Of the longest document of a batch: what is shorter goes to the next batch, which bounds the padding."""


LONGEST_WITH_SCORES = 256
"""Tokens of the longest document up to which a CPU makes all scores at once: for short ones the backward pass of its sdpa
takes several times as long."""


LENGTH_MULTIPLE = 8
"""Batches of documents are padded to multiples of it: a CPU's products make a kernel for every new length."""


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """Documents that are computed together.

    Attributes:
        num_documents: how many.
        length: tokens of each, padding included.
        make_mask: of a document longer than a sliding window; None for plain causality.
    """

    num_documents: int
    length: int
    make_mask: Callable[[], torch.Tensor] | None = None

    @property
    def mask(self) -> torch.Tensor | None:
        """Who sees whom in each document, boolean (1, 1, length, length); None for plain causality."""
        return None if self.make_mask is None else self.make_mask()


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a row in batches, which lie one behind the other, padding and what they share with others included.

    Attributes:
        batches: the batches.
        places: the token of the row at each place of the batches, int64; 0 for padding.
        back: the place of each token of the row in the batches, int64 (seq,): that in its own document.
        shared: tokens that further documents begin with; None where each document is by itself.
        layout: of the row, where all scores are made; None where sdpa makes them.
        lengths: of the row, where a kernel takes documents of any; None where there is none.
    """

    batches: tuple[DocumentBatch, ...]
    places: torch.Tensor
    back: torch.Tensor
    shared: Shared | None
    layout: Layout | None = None
    lengths: Lengths | None = None


_POSITIONS: ContextVar[torch.Tensor | None] = ContextVar("positions", default=None)


def attends_by_documents(model: Any) -> bool:
    """Say whether a model's attention is this one."""
    return bool(model.config._attn_implementation == NAME)


@contextmanager
def positions_of_row(position_ids: torch.Tensor | None) -> Iterator[None]:
    """Tell `find_documents` the positions of the packed row that a model is given, (1, seq) on the host; None: not packed.

    Transformers tells its mask functions where documents begin by tensors on the device, which the host would wait for.
    """
    token = _POSITIONS.set(position_ids)
    try:
        yield
    finally:
        _POSITIONS.reset(token)


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

    Called once per forward pass for each kind of layer, with the arguments of Transformers' own mask functions. Packed rows
    are those of `positions_of_row`; `mask_function` says who sees whom inside a document.
    """
    positions = _POSITIONS.get()
    if positions is not None:
        if use_vmap:
            raise NotImplementedError("packed rows under a mask function of the model's own")
        if (batch_size, q_length, kv_length) != (1, *2 * positions.shape[1:]):
            raise NotImplementedError(
                f"a mask of {batch_size} x {q_length} x {kv_length} for {positions.numel()} tokens"
            )
    spans = [] if positions is None else _spans(positions[0])
    if positions is None or len(spans) == 1:
        return AttentionMaskInterface()["sdpa"](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask if positions is None else None,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap,
            device=device,
            **others,
        )
    places, zero = torch.arange(q_length, device=device), torch.zeros((), dtype=torch.long, device=device)
    longest = max((span for span in spans if not span.num_shared), key=lambda span: span.length)

    @cache
    def mask_of(length: int) -> torch.Tensor:
        own = places[longest.begin : longest.begin + length]
        return mask_function(zero, zero, own[:, None], own[None, :])[None, None]

    documents = _in_batches(sorted(spans, key=lambda span: -span.length), local_size, mask_of, device)
    window: Window | None = CAUSAL
    if local_size is not None and documents.batches[0].make_mask is not None:
        own = torch.arange(longest.begin, longest.end)  # on the host, which would wait for the device
        window = (local_size - 1, 0) if _sees_window(mask_function, own, local_size) else None
    if window is not None and varlen.works_on(device, windowed=window != CAUSAL):
        return replace(documents, lengths=Lengths.of(spans, device, window))
    if device.type != "cpu" or documents.batches[0].length > LONGEST_WITH_SCORES:
        return documents
    return replace(documents, layout=_layout(documents))


def _sees_window(mask_function: MaskFunction, own: torch.Tensor, size: int) -> bool:
    """Say whether queries at the positions `own`, (length,), see themselves and the `size` - 1 tokens before them."""
    zero, later = torch.zeros_like(own[0]), own[size:]
    try:
        first, before = (mask_function(zero, zero, later, later - distance) for distance in (size - 1, size))
    except RuntimeError:  # it reads tensors of the device, as that of chunks does
        return False
    return bool((first & ~before).all())


def _spans(positions: torch.Tensor) -> list[Span]:
    """Return the documents of a row from the positions of its tokens, (seq,): one begins where they do not count on."""
    begins = functional.pad(positions.diff() != 1, (1, 0), value=True).nonzero()[:, 0]
    begin_of, num_shared_of = torch.stack([begins, positions[begins]]).tolist()
    spans, root = [], 0
    for begin, num_shared, end in zip(begin_of, num_shared_of, [*begin_of[1:], len(positions)], strict=True):
        root = root if num_shared else begin
        spans.append(Span(root, num_shared, begin, end))
    return spans


def _in_batches(
    spans: Sequence[Span],
    local_size: int | None,
    mask_of: Callable[[int], torch.Tensor],
    device: torch.device,
) -> Documents:
    """Return documents, the longest first, in batches."""
    batches: list[DocumentBatch] = []
    found: list[torch.Tensor] = []
    shared: list[torch.Tensor] = []
    back = torch.empty(sum(span.end - span.begin for span in spans), dtype=torch.long)
    size, first = 0, 0
    while first < len(spans):
        length = spans[first].length
        masked = local_size is not None and length > local_size
        if not masked:
            length = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        last = first + 1
        while not masked and last < len(spans) and spans[last].length >= SHORTEST_SHARE * spans[first].length:
            last += 1
        for span in spans[first:last]:
            before = torch.arange(span.root, span.root + span.num_shared)
            tokens = torch.cat([before, torch.arange(span.begin, span.end)])
            found.append(functional.pad(tokens, (0, length - span.length)))
            shared.append(torch.arange(size, size + span.num_shared))
            back[span.begin : span.end] = torch.arange(size + span.num_shared, size + span.length)
            size += length
        batches.append(DocumentBatch(last - first, length, partial(mask_of, length) if masked else None))
        first = last
    places, copies = torch.cat(found), torch.cat(shared)
    shared_tokens = shared_of(places, copies, device)
    return Documents(
        tuple(batches), host_copies.to_device(places, device), host_copies.to_device(back, device), shared_tokens
    )


def _layout(documents: Documents) -> Layout:
    sizes = tuple((batch.num_documents, batch.length) for batch in documents.batches)
    lengths = torch.cat([torch.full((count * length,), length) for count, length in sizes])
    offsets = torch.cat([torch.arange(length).repeat(count) for count, length in sizes])
    every = Places(torch.arange(len(offsets)) - offsets, offsets, lengths)
    is_own = torch.zeros(len(offsets), dtype=torch.bool)
    is_own[documents.back] = True
    return Layout(
        sizes,
        tuple(_bias(batch) for batch in documents.batches),
        documents.places,
        is_own,
        every.at(documents.back),
        None if documents.shared is None else every.at(documents.shared.places),
        documents.shared,
    )


def _bias(batch: DocumentBatch) -> torch.Tensor:
    """Return what is added to the scores of a batch, (1, 1, length, length)."""
    mask = batch.mask
    if mask is None:
        mask = torch.ones(1, 1, batch.length, batch.length, dtype=torch.bool).tril()
    return torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)


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
    capped, scaling = options.get("softcap") is not None, options.get("scaling")
    compute = soft_capped_attention if capped else AttentionInterface()["sdpa"]
    if not isinstance(attention_mask, Documents):
        return compute(module, query, key, value, attention_mask, **options)
    layout, plain = attention_mask.layout, options.get("position_bias") is None and not options.get("dropout")
    if scaling is not None and plain and not capped:
        if attention_mask.lengths is not None and varlen.takes(query, value):
            return varlen_documents(query, key, value, attention_mask.lengths, scaling), None
        if layout is not None:
            return scored_documents(query, key, value, layout, scaling), None
    sizes = [batch.num_documents * batch.length for batch in attention_mask.batches]

    def parts(states: torch.Tensor, shared: Shared | None) -> list[torch.Tensor]:
        """Return (1, heads, seq, head_dim) as (documents, heads, length, head_dim) of each batch."""
        rows = Spread.apply(states[0].transpose(0, 1), attention_mask.places, attention_mask.back, shared)
        each = zip(rows.split(sizes), attention_mask.batches, strict=True)
        return [part.unflatten(0, (batch.num_documents, batch.length)).transpose(1, 2) for part, batch in each]

    shared = attention_mask.shared  # a document's copies ask nothing: their own document has the answers
    each = zip(parts(query, None), parts(key, shared), parts(value, shared), attention_mask.batches, strict=True)
    outputs = [compute(module, q, k, v, batch.mask, **options)[0].flatten(0, 1) for q, k, v, batch in each]
    together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return Collect.apply(together, attention_mask.places, attention_mask.back)[None], None


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
