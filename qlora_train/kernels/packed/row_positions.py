"""The positions of the packed row in a forward pass, for the mask function of `packed.attention`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

PACKED_ATTENTION = "packed_documents"
"""`attn_implementation` of a model that trains on packed rows."""

# Transformers passes only device tensors to mask functions; reading document boundaries from them would sync the host
_POSITION_IDS: ContextVar[Tensor | None] = ContextVar("position_ids", default=None)


def uses_packed_attention(model: Any) -> bool:
    """Return whether a model's attention is `packed_attention`."""
    return bool(model.config._attn_implementation == PACKED_ATTENTION)


@contextmanager
def packed_row(position_ids: Tensor | None) -> Iterator[None]:
    """Give `packed_mask` the positions (1, seq), on the host, of the row in a forward pass; None: not packed."""
    token = _POSITION_IDS.set(position_ids)
    try:
        yield
    finally:
        _POSITION_IDS.reset(token)


def positions_of_row() -> Tensor | None:
    """Return the positions of the row in this forward pass; None: not packed."""
    return _POSITION_IDS.get()
