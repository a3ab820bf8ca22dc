"""The KL divergence that KTO's losses of an optimizer step share, estimated before its first micro-batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qlora_train.data.collate import Batch
from qlora_train.data.mismatched_rows import mismatched_batch
from qlora_train.objectives.kto_loss import KL
from qlora_train.parallel import context


def with_step_kl(
    batches: Sequence[Batch],
    kl_sum: Callable[[Batch], Tensor],
    num_rows: int,
    device: torch.device,
    *,
    num_repeated: int,
) -> list[Batch]:
    """Return the micro-batches of this rank with the KL divergence of the whole step, a scalar >= 0.

    Args:
        kl_sum: summed log-probability ratios of a batch of mismatched sequences.
        num_rows: rows of the step, over all ranks.
        num_repeated: micro-batches at the end that do not count: other ranks gather sharded weights with this one.
    """
    sums = [kl_sum(mismatched_batch(batch)) for batch in batches]
    total = torch.zeros((), device=device) + sum(sums[: len(sums) - num_repeated])
    kl = (context().sum_(total) / num_rows).clamp(min=0)
    return [{**batch, KL: kl} for batch in batches]
