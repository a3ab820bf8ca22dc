"""A reference of torch's varlen attention, whose kernel needs a GPU."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_train.kernels.packed import varlen


def use_reference_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the varlen kernel, for the dtypes of tests too, and return a list that grows with every call."""
    calls: list[int] = []

    def counted(*arguments: Any, **keywords: Any) -> Tensor:
        calls.append(1)
        return reference_varlen(*arguments, **keywords)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(varlen, "works_on", lambda *_, **__: True)
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32, torch.float64))
    return calls


def reference_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool | None = None,
) -> Tensor:  # fmt: skip
    """Compute causal attention as documented for `torch.nn.attention.varlen.varlen_attn`, (queries, heads, head_dim)."""
    left, right = window_size
    assert left >= -1
    assert right == 0
    assert enable_gqa in {None, query.shape[1] != key.shape[1]}
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    found = []
    for q_span, k_span in zip(
        itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True
    ):
        q, k, v = query[slice(*q_span)], key[slice(*k_span)], value[slice(*k_span)]
        k, v = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        last = torch.arange(len(q))[:, None] + len(k) - len(q)  # queries are the last of the keys
        back = last - torch.arange(len(k))
        sees = ((back >= 0) & (back <= (len(k) if left < 0 else left))).to(scores.device)
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(found)
