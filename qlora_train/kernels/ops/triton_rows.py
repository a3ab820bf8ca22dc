"""The layout of kernel inputs."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """Return x as (rows, features) with contiguous rows, copied only if necessary."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
