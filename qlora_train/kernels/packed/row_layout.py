"""Rows of a pack as rows that documents are computed from, and back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_train.kernels import host_copies


@dataclass(frozen=True, slots=True)
class Span:
    """A document: the row's tokens from `begin` to `end`, behind the first `num_shared` of those from `root` on."""

    root: int
    num_shared: int
    begin: int
    end: int

    @property
    def length(self) -> int:
        return self.num_shared + self.end - self.begin


@dataclass(frozen=True, slots=True)
class Shared:
    """Tokens of a row that other documents begin with too.

    Attributes:
        places: where they are in the batches of those others, int64 (num_places,).
        tokens: the tokens, int64 (num_tokens,), ascending.
        token_of: which of `tokens` is at each of `places`, int64 (num_places,).
    """

    places: Tensor
    tokens: Tensor
    token_of: Tensor


def shared_of(places: Tensor, copies: Tensor, device: torch.device) -> Shared | None:
    """Return the tokens that documents have copies of, or None where there are no copies.

    Args:
        places: the token at each place, int64 (num_places,).
        copies: the places that are copies, int64 (num_copies,).
        device: where they are needed.
    """
    if not len(copies):
        return None
    tokens, token_of = places[copies].unique(return_inverse=True)
    return Shared(*(host_copies.to_device(each, device) for each in (copies, tokens, token_of)))


class Spread(torch.autograd.Function):
    """Rows of a pack -> rows of its batches. No gradient comes from padding, whose results nobody reads."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, back: Tensor, shared: Shared | None) -> Tensor:
        ctx.save_for_backward(back)
        ctx.shared = shared
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        shared: Shared | None = ctx.shared
        found = grad.index_select(0, back)
        if shared is not None:  # sums of many, in float32
            total = found.index_select(0, shared.tokens).float()
            total.index_add_(0, shared.token_of, grad.index_select(0, shared.places).float())
            found.index_copy_(0, shared.tokens, total.to(found.dtype))
        return found, None, None, None


class Collect(torch.autograd.Function):
    """Rows of the batches of a pack -> rows of the pack."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.num_rows = len(places)
        return rows.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, back, grad), None, None
