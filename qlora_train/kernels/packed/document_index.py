"""The documents of a packed row, and the row indices that each of them attends to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qlora_train.kernels import host_copies


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens `begin` to `end` of a row, behind a shared prefix: the `num_shared` tokens from `root` on."""

    root: int
    num_shared: int
    begin: int
    end: int

    @property
    def length(self) -> int:
        return self.num_shared + self.end - self.begin

    def tokens(self) -> Tensor:
        """Return row indices, the shared prefix included, int64 (length,)."""
        prefix = torch.arange(self.root, self.root + self.num_shared)
        return torch.cat([prefix, torch.arange(self.begin, self.end)])


def find_documents(position_ids: Tensor) -> list[Document]:
    """Return the documents of a row from the positions of its tokens, (seq,).

    A document begins where positions are not consecutive. One that begins at position p > 0 shares the first p tokens of
    the last document that begins at 0.
    """
    begins = functional.pad(position_ids.diff() != 1, (1, 0), value=True).nonzero()[:, 0]
    begin_of, num_shared_of = torch.stack([begins, position_ids[begins]]).tolist()
    documents, root = [], 0
    for begin, num_shared, end in zip(begin_of, num_shared_of, [*begin_of[1:], len(position_ids)], strict=True):
        root = root if num_shared else begin
        documents.append(Document(root, num_shared, begin, end))
    return documents


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Tokens that are gathered for more than one document.

    Attributes:
        copies: where the further documents' copies are gathered, int64 (num_copies,).
        tokens: row indices, ascending and unique, int64 (num_tokens,).
        token_of: index into `tokens` of each copy, int64 (num_copies,).
    """

    copies: Tensor
    tokens: Tensor
    token_of: Tensor


def shared_prefixes(tokens: Tensor, copies: Tensor, device: torch.device) -> SharedPrefixes | None:
    """Return what `copies`, indices into `tokens`, are copies of; None without copies."""
    if not len(copies):
        return None
    unique, token_of = tokens[copies].unique(return_inverse=True)
    return SharedPrefixes(*(host_copies.to_device(each, device) for each in (copies, unique, token_of)))


@dataclass(frozen=True, slots=True)
class DocumentIndex:
    """Gathers the tokens of a row by document, shared prefixes and padding included, and scatters them back.

    Attributes:
        tokens: row index of each gathered token, int64 (num_gathered,); 0 for padding.
        own: gathered index of each token of the row in its own document, int64 (seq,).
        shared: None if no document has a shared prefix.
    """

    tokens: Tensor
    own: Tensor
    shared: SharedPrefixes | None

    @classmethod
    def build(cls, documents: Sequence[Document], lengths: Iterable[int], device: torch.device) -> "DocumentIndex":
        """Index documents, in this order, each padded on the right to its length of `lengths`."""
        tokens, copies, size = [], [], 0
        own = torch.empty(sum(document.end - document.begin for document in documents), dtype=torch.long)
        for document, length in zip(documents, lengths, strict=True):
            tokens.append(functional.pad(document.tokens(), (0, length - document.length)))
            copies.append(torch.arange(size, size + document.num_shared))
            own[document.begin : document.end] = torch.arange(size + document.num_shared, size + document.length)
            size += length
        gathered = torch.cat(tokens)
        shared = shared_prefixes(gathered, torch.cat(copies), device)
        return cls(host_copies.to_device(gathered, device), host_copies.to_device(own, device), shared)

    def gather(self, rows: Tensor, *, is_query: bool = False) -> Tensor:
        """Return (num_gathered, ...) from (seq, ...); the queries of a shared prefix have no gradient from its copies."""
        gathered: Tensor = _Gather.apply(rows, self.tokens, self.own, None if is_query else self.shared)
        return gathered

    def scatter(self, gathered: Tensor) -> Tensor:
        """Return (seq, ...) from (num_gathered, ...)."""
        rows: Tensor = _Scatter.apply(gathered, self.own)
        return rows


class _Gather(torch.autograd.Function):
    """Padding has no gradient: nothing reads its results."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, own: Tensor, shared: SharedPrefixes | None) -> Tensor:
        ctx.own, ctx.shared = own, shared
        return rows.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        shared: SharedPrefixes | None = ctx.shared
        grad = grad.contiguous()  # index_select of strided rows is slow on CPUs
        grad_rows = grad.index_select(0, ctx.own)
        if shared is not None:  # sums of many documents, in float32
            total = grad_rows.index_select(0, shared.tokens).float()
            total.index_add_(0, shared.token_of, grad.index_select(0, shared.copies).float())
            grad_rows.index_copy_(0, shared.tokens, total.to(grad_rows.dtype))
        return grad_rows, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gathered: Tensor, own: Tensor) -> Tensor:
        ctx.own, ctx.num_gathered = own, len(gathered)
        return gathered.index_select(0, own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.num_gathered, *grad.shape[1:]).index_copy_(0, ctx.own, grad), None
