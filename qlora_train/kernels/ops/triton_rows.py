"""The rows of a tensor, as the kernels read them."""

from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """Return x as (rows, features) with contiguous rows, copied where it does not lie like that."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
