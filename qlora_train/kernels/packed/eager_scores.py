"""Attention over documents of one row with all scores, for short ones: the arithmetic of `grouped_attention`.

Queries, keys and values of a row are gathered into the rows that products are made of, in one pass each, and what comes out
is gathered back. A document that begins with tokens of another one has copies of their keys and values; their gradients
are added up in float32.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_train.kernels.grouped_attention import attend_with_scores, gradients_with_scores, in_one_dtype
from qlora_train.kernels.packed.row_layout import Shared


@dataclass(frozen=True, slots=True)
class Places:
    """Where tokens of a row are in batches of documents that lie one behind the other.

    Attributes:
        starts: where the token's document begins, int64 (num_places,).
        offsets: how far behind that the token is, int64 (num_places,).
        lengths: how long the documents of its batch are, padding included, int64 (num_places,).
    """

    starts: Tensor
    offsets: Tensor
    lengths: Tensor

    def at(self, places: Tensor) -> "Places":
        """Return some of them, by number."""
        return Places(self.starts[places], self.offsets[places], self.lengths[places])

    def rows(self, num_heads: int) -> Tensor:
        """Return the rows of (documents, heads, length) of each batch, int64 (num_places * heads,), heads side by side."""
        heads = torch.arange(num_heads, device=self.starts.device)
        first = self.starts * num_heads + self.offsets
        return (first[:, None] + heads * self.lengths[:, None]).flatten()


@dataclass(frozen=True, slots=True)
class Layout:
    """How a row is laid into batches of documents.

    Attributes:
        sizes: (documents, length) of each batch.
        biases: what is added to the scores of each, (1, 1, length, length).
        tokens: the token at each place of the batches, int64 (num_places,); 0 for padding.
        is_own: whether the answer at a place is that of its token, (num_places,): neither padding nor a copy.
        of_tokens: the place of each token of the row.
        copies: where copies of tokens are; None where there are none.
        shared: the tokens that they are of; None where there are none.
        known: row numbers that were made for a number of heads.
    """

    sizes: tuple[tuple[int, int], ...]
    biases: tuple[Tensor, ...]
    tokens: Tensor
    is_own: Tensor
    of_tokens: Places
    copies: Places | None
    shared: Shared | None
    known: dict[Any, Tensor] = field(default_factory=dict)

    def gathered(self, heads: int, token_stride: int, head_stride: int, missing: int | None = None) -> Tensor:
        """Return which row of (tokens, heads) or (heads, tokens) is at each row of the batches, int64.

        `missing` is the row that stands for places that are not a token's own.
        """
        key = heads, token_stride, head_stride, missing
        if key not in self.known:
            rows = self.tokens * token_stride + torch.arange(heads, device=self.tokens.device)[:, None] * head_stride
            if missing is not None:
                rows = rows.masked_fill(~self.is_own, missing)
            counts = [documents * length for documents, length in self.sizes]
            each = zip(rows.split(counts, 1), self.sizes, strict=True)
            self.known[key] = torch.cat([some.view(heads, *size).transpose(0, 1).flatten() for some, size in each])
        return self.known[key]

    def rows_of(self, which: str, places: Places, heads: int) -> Tensor:
        """Return `places.rows(heads)`, which is made once under this name."""
        if (which, heads) not in self.known:
            self.known[which, heads] = places.rows(heads)
        return self.known[which, heads]

    def back(self, heads: int) -> Tensor:
        """Return the row of the batches that holds each token and head, int64 (seq * heads,)."""
        return self.rows_of("tokens", self.of_tokens, heads)


def scored_documents(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
    """Return the attention's output, (1, seq, heads, value features).

    Args:
        query: (1, heads, seq, features).
        key: (1, key heads, seq, features).
        value: (1, key heads, seq, value features).
        layout: of the row.
        scaling: factor of the scores.
    """
    output: Tensor = _ScoredDocuments.apply(*in_one_dtype(query, key, value), layout, scaling)
    return output


class _ScoredDocuments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
        heads, key_heads = query.shape[1], key.shape[1]
        parts = [_batches(each, layout, key_heads) for each in (query, key, value)]
        outputs, saved = [], []
        for q, k, v, bias, (documents, length) in zip(*parts, layout.biases, layout.sizes, strict=True):
            output, weights = attend_with_scores(q, k, v, bias, scaling, (documents, heads, length))
            outputs.append(output.view(-1, output.shape[-1]))
            saved += [q, k, v, weights]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scaling, ctx.heads, ctx.key_heads = layout, scaling, heads, key_heads
        together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return together.index_select(0, layout.back(heads)).view(1, -1, heads, together.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layout, heads, key_heads, saved = ctx.layout, ctx.heads, ctx.key_heads, ctx.saved_tensors
        features, num_rows = grad.shape[-1], grad.shape[1] * heads
        with_zeros = torch.nn.functional.pad(grad.reshape(num_rows, features), (0, 0, 0, 1))
        grads = with_zeros.index_select(0, layout.gathered(heads, heads, 1, num_rows))
        counts = [documents * length * heads for documents, length in layout.sizes]
        found: list[list[Tensor]] = []
        for number, part in enumerate(grads.split(counts)):
            q, k, v, weights = saved[4 * number : 4 * number + 4]
            each = gradients_with_scores(part.view(*weights.shape[:2], features), q, k, v, weights, ctx.scaling)
            found.append([gradient.view(-1, gradient.shape[-1]) for gradient in each])
        grad_q, grad_k, grad_v = (
            parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*found, strict=True)
        )
        grad_query = _of_row(grad_q.index_select(0, layout.back(heads)), heads)
        return grad_query, _summed(grad_k, layout, key_heads), _summed(grad_v, layout, key_heads), None, None


def _batches(states: Tensor, layout: Layout, key_heads: int) -> list[Tensor]:
    """Return (1, heads, seq, features) as (documents * key heads, heads per key head * length, features) of each batch."""
    _, heads, seq, features = states.shape
    side_by_side = states.transpose(1, 2)
    if side_by_side.is_contiguous():
        rows, strides = side_by_side.view(-1, features), (heads, 1)
    else:
        rows, strides = states.reshape(-1, features), (1, seq)
    gathered = rows.index_select(0, layout.gathered(heads, *strides))
    counts = [documents * length * heads for documents, length in layout.sizes]
    each = zip(gathered.split(counts), layout.sizes, strict=True)
    return [part.view(documents * key_heads, -1, features) for part, (documents, _) in each]


def _summed(grad: Tensor, layout: Layout, heads: int) -> Tensor:
    """Return the gradient of keys or values from its rows in the batches, copies added to the tokens that they are of."""
    found = grad.index_select(0, layout.back(heads))
    if layout.copies is not None and layout.shared is not None:
        tokens = found.view(-1, heads * found.shape[-1])
        total = tokens.index_select(0, layout.shared.tokens).float()
        copies = grad.index_select(0, layout.rows_of("copies", layout.copies, heads)).view(-1, tokens.shape[1])
        total.index_add_(0, layout.shared.token_of, copies.float())
        tokens.index_copy_(0, layout.shared.tokens, total.to(found.dtype))
    return _of_row(found, heads)


def _of_row(rows: Tensor, heads: int) -> Tensor:
    return rows.view(1, -1, heads, rows.shape[-1]).transpose(1, 2)
