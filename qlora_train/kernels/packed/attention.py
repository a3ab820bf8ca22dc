"""Attention over packed documents: each attends to itself and its shared prefix, without a mask of the whole row.

Transformers detects documents by positions that restart at 0. Its own kernels then make a (tokens, tokens) mask and compute
every pair. Here the cost is the sum of the squared document lengths. On a GPU torch's varlen kernel computes all documents
at once, sliding windows included. Elsewhere documents of similar length are padded to batches: on the right, where
causality hides the padding. A document longer than its sliding window is a batch of its own, with a mask.

A document whose positions begin at p > 0 attends to a shared prefix too: the first p tokens of the last document that
begins at 0. The gradient of the prefix is the sum over all documents that share it.

Rows that are not packed go through Transformers' sdpa unchanged. Soft-capped scores are computed as in Transformers' eager
attention.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from qlora_train.kernels.packed import varlen
from qlora_train.kernels.packed.document_index import Document, DocumentIndex, find_documents
from qlora_train.kernels.packed.eager_documents import EagerDocuments, eager_documents
from qlora_train.kernels.packed.row_positions import PACKED_ATTENTION, positions_of_row
from qlora_train.kernels.packed.varlen import CAUSAL, SequenceLengths, Window, varlen_documents

MIN_LENGTH_SHARE = 0.75
"""Min length in a batch, as a share of the max: bounds the padding."""
MAX_EAGER_LENGTH = 256
"""Longest document for eager attention on a CPU, where the backward pass of sdpa takes several times as long."""
LENGTH_MULTIPLE = 8
"""Batches are padded to a multiple: oneDNN compiles a kernel for every new length."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query index, key index), broadcast, -> whether the query attends to the key."""


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """Documents padded to one length; `mask_of(length)` makes the mask of a document longer than its sliding window."""

    num_documents: int
    length: int
    mask_of: Callable[[int], Tensor] | None = None

    @property
    def mask(self) -> Tensor | None:
        """Boolean (1, 1, length, length); None: causal."""
        return None if self.mask_of is None else self.mask_of(self.length)


@dataclass(frozen=True, slots=True)
class Documents:
    """What `packed_attention` receives as its mask.

    Attributes:
        batches: in the order of `index`.
        index: gathers the row's tokens into the batches.
        eager: for short documents on a CPU; None: sdpa.
        lengths: for the varlen kernel; None: it does not apply.
    """

    batches: tuple[DocumentBatch, ...]
    index: DocumentIndex
    eager: EagerDocuments | None = None
    lengths: SequenceLengths | None = None


def register() -> None:
    """Register both functions with Transformers under `PACKED_ATTENTION`."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)


def packed_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device,
    **others: Any,
) -> Documents | Tensor | None:
    """Return the documents of the row in `packed_row`; for any other input, the mask for sdpa.

    Transformers calls this once per forward pass for each kind of layer. `mask_function` is the mask within a document.
    """
    position_ids = positions_of_row()
    documents = [] if position_ids is None else find_documents(position_ids[0])
    if position_ids is not None:
        if use_vmap:
            raise NotImplementedError("packed rows with a custom mask function of the model")
        if (batch_size, q_length, kv_length) != (1, *2 * position_ids.shape[1:]):
            raise NotImplementedError(
                f"a mask of {batch_size} x {q_length} x {kv_length} for {position_ids.numel()} tokens"
            )
    if len(documents) <= 1:
        return AttentionMaskInterface()["sdpa"](
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
            attention_mask=attention_mask if position_ids is None else None,
            local_size=local_size, use_vmap=use_vmap, device=device, **others,
        )  # fmt: skip
    return _batched(documents, mask_function, local_size, device)


def _batched(
    documents: Sequence[Document], mask_function: MaskFunction, local_size: int | None, device: torch.device
) -> Documents:
    root = max((document for document in documents if not document.num_shared), key=lambda document: document.length)

    @cache
    def mask_of(length: int) -> Tensor:
        positions = torch.arange(root.begin, root.begin + length, device=device)
        zero = torch.zeros((), dtype=torch.long, device=device)
        return mask_function(zero, zero, positions[:, None], positions[None, :])[None, None]

    longest_first = sorted(documents, key=lambda document: -document.length)
    batches = _in_batches([document.length for document in longest_first], local_size, mask_of)
    lengths = [batch.length for batch in batches for _ in range(batch.num_documents)]
    found = Documents(tuple(batches), DocumentIndex.build(longest_first, lengths, device))
    window: Window | None = CAUSAL
    if local_size is not None and batches[0].mask_of is not None:
        is_window = _is_sliding_window(mask_function, torch.arange(root.begin, root.end), local_size)
        window = (local_size - 1, 0) if is_window else None
    if window is not None and varlen.works_on(device, windowed=window != CAUSAL):
        return replace(found, lengths=SequenceLengths.of(documents, device, window))
    if device.type == "cpu" and batches[0].length <= MAX_EAGER_LENGTH:
        sizes = [(batch.num_documents, batch.length) for batch in batches]
        return replace(found, eager=EagerDocuments(sizes, [_bias(batch) for batch in batches], found.index))
    return found


def _in_batches(
    lengths: Sequence[int], local_size: int | None, mask_of: Callable[[int], Tensor]
) -> list[DocumentBatch]:
    """Divide documents, of descending lengths, into batches."""
    batches: list[DocumentBatch] = []
    while lengths:
        longest = lengths[0]
        if local_size is not None and longest > local_size:
            batches.append(DocumentBatch(1, longest, mask_of))
        else:
            count = sum(length >= MIN_LENGTH_SHARE * longest for length in lengths)
            batches.append(DocumentBatch(count, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE))
        lengths = lengths[batches[-1].num_documents :]
    return batches


def _is_sliding_window(mask_function: MaskFunction, positions: Tensor, size: int) -> bool:
    """Return whether each query at `positions`, (length,), attends to itself and the `size` - 1 tokens before it."""
    zero, later = torch.zeros_like(positions[0]), positions[size:]
    try:
        first, before = (mask_function(zero, zero, later, later - distance) for distance in (size - 1, size))
    except RuntimeError:  # chunked attention reads tensors of the device; `positions` are on the host
        return False
    return bool((first & ~before).all())


def _bias(batch: DocumentBatch) -> Tensor:
    mask = batch.mask
    if mask is None:
        mask = torch.ones(1, 1, batch.length, batch.length, dtype=torch.bool).tril()
    return torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer.

    Args:
        module: the layer's attention module.
        query: (batch, heads, seq, head_dim).
        key: (batch, key_value_heads, seq, head_dim).
        value: (batch, key_value_heads, seq, head_dim).
        attention_mask: from `packed_mask`.
        options: of Transformers' attention functions: `scaling`, `dropout`, `softcap`, ...

    Returns:
        (batch, seq, heads, head_dim), and None for the attention weights.
    """
    scaling: Any = options.get("scaling")
    is_capped = options.get("softcap") is not None
    compute = soft_capped_attention if is_capped else AttentionInterface()["sdpa"]
    if not isinstance(attention_mask, Documents):
        return compute(module, query, key, value, attention_mask, **options)
    documents = attention_mask
    if scaling is None or is_capped or options.get("position_bias") is not None or options.get("dropout"):
        documents = replace(documents, lengths=None, eager=None)
    if documents.lengths is not None and varlen.supports(query, value):
        return varlen_documents(query, key, value, documents.lengths, scaling), None
    if documents.eager is not None:
        return eager_documents(query, key, value, documents.eager, scaling), None

    sizes = [batch.num_documents * batch.length for batch in documents.batches]

    def in_batches(states: Tensor, *, is_query: bool = False) -> list[Tensor]:
        """Return (1, heads, seq, head_dim) as (documents, heads, length, head_dim) of each batch."""
        rows = states[0].transpose(0, 1)
        if rows.device.type == "cpu":
            rows = rows.contiguous()  # index_select of strided rows is slow there
        each = zip(documents.index.gather(rows, is_query=is_query).split(sizes), documents.batches, strict=True)
        return [part.unflatten(0, (batch.num_documents, batch.length)).transpose(1, 2) for part, batch in each]

    qkv = (in_batches(query, is_query=True), in_batches(key), in_batches(value))
    each = zip(*qkv, documents.batches, strict=True)
    outputs = [compute(module, q, k, v, batch.mask, **options)[0] for q, k, v, batch in each]
    flat = [output.flatten(0, 1) for output in outputs]
    return documents.index.scatter(flat[0] if len(flat) == 1 else torch.cat(flat))[None], None


def soft_capped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    softcap: float,
    scaling: float,
    dropout: float = 0.0,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Compute attention with scores softcap * tanh(scores / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118).

    Shapes are those of `packed_attention`; `attention_mask` is boolean, (batch, 1, seq, key seq), None: causal. The order
    of operations and the dtypes are those of Transformers' eager attention.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is None:
        num_past = key.shape[2] - query.shape[2]
        attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(num_past)
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None
