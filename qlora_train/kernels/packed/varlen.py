"""Attention over packed documents by `torch.nn.attention.varlen`, without padding.

A document with a shared prefix has fewer queries than keys. Its last query sees all keys: the kernel's causality is
bottom-right aligned (FlashAttention 2.1).
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
from qlora_train.kernels.packed.document_index import Document, DocumentIndex

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
OPTIONS = inspect.signature(varlen_attn).parameters
"""torch 2.11 has no `enable_gqa` and takes grouped heads without it; 2.10 has no `window_size`, which the trial finds."""
Window = tuple[int, int]
CAUSAL: Window = (-1, 0)
TOLERANCE = 2e-2
"""Max difference from attention in float32 in the trial, as a share of the largest value."""


@dataclass(frozen=True, slots=True)
class SequenceLengths:
    """The kernel's description of the documents of a row.

    Attributes:
        cu_seqlens_q: int32 (num_documents + 1,).
        cu_seqlens_k: int32 (num_documents + 1,), shared prefixes included.
        max_seqlen_q: of a document.
        max_seqlen_k: of a document.
        keys: None without shared prefixes: keys are the row's tokens.
        window: number of keys before and behind its own that a query sees; -1: all.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    keys: DocumentIndex | None
    window: Window = CAUSAL

    @classmethod
    def of(cls, documents: Sequence[Document], device: torch.device, window: Window = CAUSAL) -> "SequenceLengths":
        """Describe the documents, in any order, which together are the row."""
        documents = sorted(documents, key=lambda document: document.begin)
        num_keys = [document.length for document in documents]
        num_queries = [document.length - document.num_shared for document in documents]

        def cumulative(lengths: Sequence[int]) -> Tensor:
            return host_copies.to_device(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)

        keys = DocumentIndex.build(documents, num_keys, device) if num_queries != num_keys else None
        return cls(cumulative(num_queries), cumulative(num_keys), max(num_queries), max(num_keys), keys, window)


def supports(query: Tensor, value: Tensor) -> bool:
    """Return whether the kernel supports heads of this dtype and size, (..., head_dim)."""
    size = query.shape[-1]
    return query.dtype in DTYPES and size % 8 == 0 and size <= MAX_HEAD_DIM and size == value.shape[-1]


def varlen_documents(query: Tensor, key: Tensor, value: Tensor, lengths: SequenceLengths, scaling: float) -> Tensor:
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
        k, v = lengths.keys.gather(k), lengths.keys.gather(v)
    options: dict[str, Any] = {"scale": scaling, "window_size": lengths.window, "enable_gqa": q.shape[1] != k.shape[1]}
    output = varlen_attn(
        q, k, v, lengths.cu_seqlens_q, lengths.cu_seqlens_k, lengths.max_seqlen_q, lengths.max_seqlen_k,
        **{name: value for name, value in options.items() if name in OPTIONS},
    )  # fmt: skip
    assert isinstance(output, Tensor), "no log-sum-exp requested"
    return output[None]


@cache
def works_on(device: torch.device, *, windowed: bool = False) -> bool:
    """Compare the kernel with sdpa once per device, forward and backward, and log a warning if it fails."""
    if device.type != "cuda":
        return False
    problem = varlen_problem(device, TRIAL_WINDOW if windowed else CAUSAL)
    if problem is not None:
        logger.warning(
            "packed attention%s: sdpa in batches, torch's varlen kernel fails (%s)",
            " with a sliding window" if windowed else "", problem,
        )  # fmt: skip
    return problem is None


def varlen_problem(device: torch.device, window: Window = CAUSAL) -> str | None:
    """Compare the kernel with sdpa on a GPU, forward and backward, and return why it cannot be used, or None."""
    try:
        actual, expected = _trial(device, window, reference=False), _trial(device, window, reference=True)
    except torch.OutOfMemoryError:  # no evidence against the kernel
        raise
    except Exception as error:  # of torch, or of the driver
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    is_right = all(_is_close(one, other) for one, other in zip(actual, expected, strict=True))
    return None if is_right else "wrong results"


TRIAL = (
    Document(0, 0, 0, 70), Document(0, 33, 70, 90), Document(90, 0, 90, 91), Document(91, 0, 91, 256),
    Document(91, 129, 256, 300),
)  # fmt: skip
"""With and without a shared prefix, shorter and longer than a tile of the kernel."""
TRIAL_WINDOW: Window = (80, 0)


@torch.enable_grad()
def _trial(device: torch.device, window: Window, *, reference: bool) -> list[Tensor]:
    """Return the output and the gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if reference else DTYPES[0]
    query, key, value = leaves = [
        torch.randn(1, heads, TRIAL[-1].end, 64, generator=generator).to(DTYPES[0]).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]
    if reference:
        output = torch.cat([_reference(leaves, document, window) for document in TRIAL], dim=1)
    else:
        output = varlen_documents(query, key, value, SequenceLengths.of(TRIAL, device, window), 0.125)
    output.backward(torch.randn(output.shape, generator=generator).to(device, dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _reference(leaves: Sequence[Tensor], document: Document, window: Window) -> Tensor:
    tokens = document.tokens().to(leaves[0].device)
    q, k, v = (leaf.index_select(2, tokens) for leaf in leaves)
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=q.device).tril()
    mask = mask if window == CAUSAL else mask.triu(-window[0])
    output = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.125, enable_gqa=True)
    return output[:, :, document.num_shared :].transpose(1, 2)


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual.float() - expected).abs().max() <= TOLERANCE * expected.abs().max())
