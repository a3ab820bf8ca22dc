"""Sum the gradients of the trained parameters over all ranks, once per optimizer step.

Only adapters are trained: their gradients are small, so that one reduction after the last micro-batch costs less than hooks
that overlap it with the backward pass. A parameter that no rank used, such as that of an expert without tokens, stays
without a gradient, so that the optimizer skips it as in one process; one that some ranks used counts as zeros on others.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qlora_train.parallel import context

BUCKET_ELEMENTS = 1 << 26
"""Numbers per reduction: 256 MB, which bounds the extra memory of large adapters."""


@torch.no_grad()
def sum_gradients_(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Replace the gradients by their sums over all ranks, in place, and return the sum of `loss`, a scalar.

    Every rank has the same parameters in the same order; the sums are bitwise equal on all ranks.
    """
    if context().world_size == 1:
        return loss
    total = context().sum_(loss.detach().float().clone())
    for bucket in _buckets(parameters):
        _sum_bucket_(bucket)
    return total.to(loss.dtype)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(other.numel() for other in bucket) + parameter.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(parameter)
    yield bucket


def _sum_bucket_(bucket: Sequence[nn.Parameter]) -> None:
    """Sum one flat tensor: whether each parameter has a gradient, then the gradients."""
    device = bucket[0].device
    has_gradient = torch.tensor([float(parameter.grad is not None) for parameter in bucket])
    parts = [
        torch.zeros(parameter.numel(), device=device) if parameter.grad is None else parameter.grad.float().flatten()
        for parameter in bucket
    ]
    flat = context().sum_(torch.cat([has_gradient.to(device), *parts]))
    num_with_gradient = flat[: len(bucket)].tolist()
    sums = flat[len(bucket) :].split([parameter.numel() for parameter in bucket])
    for parameter, count, gradient in zip(bucket, num_with_gradient, sums, strict=True):
        if count:
            # a copy: kernels of optimizers need the alignment of a tensor of its own
            parameter.grad = gradient.reshape(parameter.shape).to(parameter.dtype, copy=True)
