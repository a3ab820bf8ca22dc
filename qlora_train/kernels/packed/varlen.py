"""Attention over documents of one row by a kernel that takes sequences of any lengths: `torch.nn.attention.varlen`.

Documents lie one behind the other as they are: nothing is padded, and queries are not moved. The keys of a document that
begins with tokens of another one are these and its own. It has fewer queries than keys then, and the last query sees all of
them, which is how the kernel takes causality (FlashAttention 2.1, "bottom right").

It is tried once on a device, forward and backward, against attention of each document by itself.
"""

import inspect
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from qlora_train.kernels import host_copies
from qlora_train.kernels.packed.row_layout import Shared, Span, Spread, shared_of

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256
OPTIONS = inspect.signature(varlen_attn).parameters
"""torch 2.11 has no `enable_gqa` and takes grouped heads without it; 2.10 has no `window_size`, which the trial finds."""
Window = tuple[int, int]
CAUSAL: Window = (-1, 0)
TOLERANCE = 2e-2
"""Largest difference from attention in float32 in the trial, as a share of the largest number."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How a row is cut into documents.

    Attributes:
        query_begins: where the queries of each begin and the last end, int32 (num_documents + 1,).
        key_begins: the same of their keys.
        most_queries: of a document.
        most_keys: of a document.
        keys: which tokens the keys are of, and what they are copies of; None where they are the row's as they lie.
        window: how many keys before and behind its own a query sees, as the kernel takes it; -1 is all of them.
    """

    query_begins: Tensor
    key_begins: Tensor
    most_queries: int
    most_keys: int
    keys: "Keys | None"
    window: Window = CAUSAL

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device, window: Window = CAUSAL) -> "Lengths":
        """Return those of the documents of a row, in any order, which together are all of it."""
        spans = sorted(spans, key=lambda span: span.begin)
        num_queries, num_keys = [span.end - span.begin for span in spans], [span.length for span in spans]

        def begins(sizes: Sequence[int]) -> Tensor:
            return host_copies.to_device(torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32), device)

        keys = Keys.of(spans, device) if num_queries != num_keys else None
        return cls(begins(num_queries), begins(num_keys), max(num_queries), max(num_keys), keys, window)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a row whose documents share tokens.

    Attributes:
        tokens: which token each is of, int64 (num_keys,).
        own: the key of each token in its own document, int64 (seq,).
        shared: tokens of which there are copies.
    """

    tokens: Tensor
    own: Tensor
    shared: Shared | None

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device) -> "Keys":
        """Return those of documents in the order of the row."""
        parts, is_copy = [], []
        for span in spans:
            parts += [torch.arange(span.root, span.root + span.num_shared), torch.arange(span.begin, span.end)]
            is_copy += [torch.ones(len(parts[-2]), dtype=torch.bool), torch.zeros(len(parts[-1]), dtype=torch.bool)]
        tokens, copies = torch.cat(parts), torch.cat(is_copy)
        shared = shared_of(tokens, copies.nonzero()[:, 0], device)
        own = (~copies).nonzero()[:, 0]
        return cls(host_copies.to_device(tokens, device), host_copies.to_device(own, device), shared)

    def __call__(self, states: Tensor) -> Tensor:
        """Return the rows of keys, (num_keys, ...), for those of tokens, (seq, ...)."""
        found: Tensor = Spread.apply(states, self.tokens, self.own, self.shared)
        return found


def takes(query: Tensor, value: Tensor) -> bool:
    """Say whether the kernel takes heads of this dtype and size, (..., head_dim)."""
    size = query.shape[-1]
    return query.dtype in DTYPES and size % 8 == 0 and size <= LARGEST_HEAD_DIM and size == value.shape[-1]


def varlen_documents(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scaling: float) -> Tensor:
    """Return causal attention of each document, (1, seq, heads, head_dim).

    Args:
        query: (1, heads, seq, head_dim).
        key: (1, key_value_heads, seq, head_dim).
        value: (1, key_value_heads, seq, head_dim).
        lengths: of the documents.
        scaling: of the scores.
    """
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if lengths.keys is not None:
        k, v = lengths.keys(k), lengths.keys(v)
    options: dict[str, Any] = {"scale": scaling, "window_size": lengths.window, "enable_gqa": q.shape[1] != k.shape[1]}
    found = varlen_attn(
        q, k, v, lengths.query_begins, lengths.key_begins, lengths.most_queries, lengths.most_keys,
        **{name: value for name, value in options.items() if name in OPTIONS},
    )  # fmt: skip
    assert isinstance(found, Tensor), "nothing else was asked for"
    return found[None]


@cache
def works_on(device: torch.device, *, windowed: bool = False) -> bool:
    """Try the kernel on a device, with or without a sliding window, once, and log a warning where it does not work."""
    if device.type != "cuda":
        return False
    window = TRIED_WINDOW if windowed else CAUSAL
    try:
        found, wanted = _tried(device, window, apart=False), _tried(device, window, apart=True)
        problem = "it computes something else"
        if all(_is_close(one, other) for one, other in zip(found, wanted, strict=True)):
            return True
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception as error:  # of torch, or of the driver
        problem = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    logger.warning(
        "documents of packs%s are computed in batches: torch's kernel for any lengths fails (%s)",
        " in a sliding window" if windowed else "", problem,
    )  # fmt: skip
    return False


TRIED = (Span(0, 0, 0, 70), Span(0, 33, 70, 90), Span(90, 0, 90, 91), Span(91, 0, 91, 256), Span(91, 129, 256, 300))
"""Documents of every kind: alone and with a beginning of another one, shorter and longer than a tile of the kernel."""
TRIED_WINDOW: Window = (80, 0)


@torch.enable_grad()
def _tried(device: torch.device, window: Window, *, apart: bool) -> list[Tensor]:
    """Return the attention of documents and the gradients of queries, keys and values, by the kernel or one by one."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if apart else DTYPES[0]
    query, key, value = leaves = [
        torch.randn(1, heads, TRIED[-1].end, 64, generator=generator).to(DTYPES[0]).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]
    if apart:
        found = torch.cat([_one(leaves, span, window) for span in TRIED], dim=1)
    else:
        found = varlen_documents(query, key, value, Lengths.of(TRIED, device, window), 0.125)
    found.backward(torch.randn(found.shape, generator=generator).to(device, dtype))
    return [found.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _one(leaves: Sequence[Tensor], span: Span, window: Window) -> Tensor:
    before, own = torch.arange(span.root, span.root + span.num_shared), torch.arange(span.begin, span.end)
    tokens = torch.cat([before, own]).to(leaves[0].device)
    q, k, v = (leaf.index_select(2, tokens) for leaf in leaves)
    sees = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=q.device).tril()
    sees = sees if window == CAUSAL else sees.triu(-window[0])
    whole = functional.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=0.125, enable_gqa=True)
    return whole[:, :, span.num_shared :].transpose(1, 2)


def _is_close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found.float() - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
