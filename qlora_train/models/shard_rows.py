"""This rank's rows of a sharded tensor: the cut that `fully_shard` makes at the first dimension."""

import torch
from torch import Tensor

from qlora_train.parallel import context


def own_rows(num_rows: int) -> range:
    """Return this rank's rows of a tensor with `num_rows` of them."""
    return rows_of(context().rank, num_rows)


def rows_of(rank: int, num_rows: int) -> range:
    """Return a rank's rows of a tensor with `num_rows` of them, as `torch.chunk` divides them."""
    size = -(-num_rows // context().world_size)
    return range(min(rank * size, num_rows), min((rank + 1) * size, num_rows))


def gather_rows(part: Tensor, num_rows: int) -> Tensor:
    """Return all rows of a tensor of finite numbers from the parts of all ranks, bitwise."""
    rows = own_rows(num_rows)
    whole = part.new_zeros((num_rows, *part.shape[1:]))
    whole[rows.start : rows.stop] = part
    return context().sum_(whole)  # x + 0 is x


def place_rows(part: Tensor, num_rows: int) -> Tensor:
    """Return a tensor of all rows that holds this rank's part; other rows are undefined."""
    rows = own_rows(num_rows)
    assert len(part) == len(rows), "loading and FSDP cut alike"
    whole = torch.empty((num_rows, *part.shape[1:]), dtype=part.dtype, device=part.device)
    whole[rows.start : rows.stop] = part.detach()
    return whole
