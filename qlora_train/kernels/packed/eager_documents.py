"""Eager attention over short packed documents on a CPU: all scores, as in `grouped_attention`.

Each of query, key and value is gathered in one pass from (heads, seq) into the rows of batched matmuls, and each result
in one pass back. Gathering tokens first and transposing heads after it would copy everything twice more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qlora_train.kernels.grouped_attention import attend, attend_backward, in_one_dtype
from qlora_train.kernels.packed.document_index import DocumentIndex


@dataclass(frozen=True, slots=True)
class EagerDocuments:
    """Batches of documents and the row indices that gather them.

    Attributes:
        sizes: (documents, length) of each batch.
        biases: added to the scores of each batch, (1, 1, length, length).
        index: gathers the row's tokens, batch by batch.
        cache: row indices by what they gather; they are equal in all layers.
    """

    sizes: Sequence[tuple[int, int]]
    biases: Sequence[Tensor]
    index: DocumentIndex
    cache: dict[Any, Tensor] = field(default_factory=dict)

    def gather_rows(self, heads: int, token_stride: int, head_stride: int, padding: int | None = None) -> Tensor:
        """Return row indices that gather (documents, heads, length) of each batch, int64 (num_rows,).

        Args:
            token_stride: distance of tokens in rows.
            head_stride: distance of heads in rows.
            padding: index for tokens that are padding or copies; None: as they are.
        """

        def make() -> Tensor:
            rows = self.index.tokens * token_stride + torch.arange(heads)[:, None] * head_stride
            if padding is not None:
                is_own = torch.zeros(len(self.index.tokens), dtype=torch.bool)
                is_own[self.index.own] = True
                rows = rows.masked_fill(~is_own, padding)
            each = zip(rows.split([count * length for count, length in self.sizes], 1), self.sizes, strict=True)
            return torch.cat([part.view(heads, *size).transpose(0, 1).flatten() for part, size in each])

        return self._cached((heads, token_stride, head_stride, padding), make)

    def rows_of_tokens(self, heads: int) -> Tensor:
        """Return the gathered row of each token and head, int64 (seq * heads,)."""
        return self._cached(("tokens", heads), lambda: self._rows(self.index.own, heads))

    def rows_of_copies(self, copies: Tensor, heads: int) -> Tensor:
        """Return the gathered row of each copy of a shared prefix and head, int64 (num_copies * heads,)."""
        return self._cached(("copies", heads), lambda: self._rows(copies, heads))

    def _cached(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def _rows(self, gathered: Tensor, heads: int) -> Tensor:
        lengths = torch.cat([torch.full((count * length,), length) for count, length in self.sizes])
        offsets = torch.cat([torch.arange(length).repeat(count) for count, length in self.sizes])
        starts = (torch.arange(len(offsets)) - offsets) * heads + offsets
        return (starts[gathered, None] + torch.arange(heads) * lengths[gathered, None]).flatten()


def eager_documents(query: Tensor, key: Tensor, value: Tensor, documents: EagerDocuments, scaling: float) -> Tensor:
    """Return the attention's output, (1, seq, heads, value features).

    Args:
        query: (1, heads, seq, features).
        key: (1, key heads, seq, features).
        value: (1, key heads, seq, value features).
    """
    output: Tensor = _EagerDocuments.apply(*in_one_dtype(query, key, value), documents, scaling)
    return output


class _EagerDocuments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: EagerDocuments, scaling: float
    ) -> Tensor:
        heads, key_heads = query.shape[1], key.shape[1]
        operands = [_gather(states, documents, key_heads) for states in (query, key, value)]
        outputs, saved = [], []
        for q, k, v, bias, (count, length) in zip(*operands, documents.biases, documents.sizes, strict=True):
            output, weights = attend(q, k, v, bias, scaling, (count, heads, length))
            outputs.append(output.view(-1, output.shape[-1]))
            saved += [q, k, v, weights]
        ctx.save_for_backward(*saved)
        ctx.documents, ctx.scaling, ctx.heads, ctx.key_heads = documents, scaling, heads, key_heads
        rows = _concatenate(outputs).index_select(0, documents.rows_of_tokens(heads))
        return rows.view(1, -1, heads, rows.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        documents, heads, saved = ctx.documents, ctx.heads, ctx.saved_tensors
        features, num_rows = grad.shape[-1], grad.shape[1] * heads
        with_zeros = functional.pad(grad.reshape(num_rows, features), (0, 0, 0, 1))
        gathered = with_zeros.index_select(0, documents.gather_rows(heads, heads, 1, padding=num_rows))
        parts: list[list[Tensor]] = []
        for number, part in enumerate(gathered.split([count * length * heads for count, length in documents.sizes])):
            q, k, v, weights = saved[4 * number : 4 * number + 4]
            found = attend_backward(part.view(*weights.shape[:2], features), q, k, v, weights, ctx.scaling)
            parts.append([gradient.view(-1, gradient.shape[-1]) for gradient in found])
        grad_q, grad_k, grad_v = (_concatenate(each) for each in zip(*parts, strict=True))
        grad_query = _as_states(grad_q.index_select(0, documents.rows_of_tokens(heads)), heads)
        return grad_query, *(_sum_copies(each, documents, ctx.key_heads) for each in (grad_k, grad_v)), None, None


def _gather(states: Tensor, documents: EagerDocuments, key_heads: int) -> list[Tensor]:
    """Return (1, heads, seq, features) as (documents * key heads, heads per key head * length, features) per batch."""
    _, heads, seq, features = states.shape
    by_token = states.transpose(1, 2)
    if by_token.is_contiguous():
        rows, strides = by_token.view(-1, features), (heads, 1)
    else:
        rows, strides = states.reshape(-1, features), (1, seq)
    gathered = rows.index_select(0, documents.gather_rows(heads, *strides))
    each = zip(
        gathered.split([count * length * heads for count, length in documents.sizes]), documents.sizes, strict=True
    )
    return [part.view(count * key_heads, -1, features) for part, (count, _) in each]


def _sum_copies(grad: Tensor, documents: EagerDocuments, heads: int) -> Tensor:
    """Return the gradient of keys or values; those of shared prefixes are summed in float32."""
    found, shared = grad.index_select(0, documents.rows_of_tokens(heads)), documents.index.shared
    if shared is not None:
        tokens = found.view(-1, heads * found.shape[-1])
        total = tokens.index_select(0, shared.tokens).float()
        copies = grad.index_select(0, documents.rows_of_copies(shared.copies, heads))
        total.index_add_(0, shared.token_of, copies.view(-1, tokens.shape[1]).float())
        tokens.index_copy_(0, shared.tokens, total.to(found.dtype))
    return _as_states(found, heads)


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _as_states(rows: Tensor, heads: int) -> Tensor:
    return rows.view(1, -1, heads, rows.shape[-1]).transpose(1, 2)
