"""Cross-entropy and its gradient in one pass, as each loss depends on its own row of logits alone.

    loss = log(sum(exp z)) - z_target        dz = softmax(z) - 1 at the target

in float32, of logits of any dtype. The gradient overwrites the logits: there is no float32 copy and no second tensor of
their size.
"""

import torch
from torch import Tensor

from qlora_train.kernels.ops import dispatch

CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Float32 logits of the reference at once: what fits in the cache of a core; what saturates a GPU."""


def losses_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each row, float32 (rows,); `logits` become the gradient of their sum.

    Args:
        logits: (rows, vocabulary), floating point.
        targets: int64 (rows,).
    """
    if dispatch.runs_triton(logits):
        from qlora_train.kernels.ops import cross_entropy_triton as kernels

        return kernels.losses_and_gradient_(logits, targets)
    return reference_(logits, targets)


def reference_(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the same in torch, chunked."""
    losses = []
    num_rows = max(1, CHUNK_BYTES["cuda" if logits.is_cuda else "cpu"] // (4 * logits.shape[-1]))
    for chunk, index in zip(logits.split(num_rows), targets[:, None].split(num_rows), strict=True):
        shifted = chunk.to(torch.float32, copy=True)
        shifted.sub_(shifted.amax(-1, keepdim=True))
        of_target = shifted.gather(1, index)
        exponentials = shifted.exp_()
        total = exponentials.sum(-1, keepdim=True)
        losses.append((total.log() - of_target)[:, 0])
        probabilities = exponentials.div_(total)
        chunk.copy_(probabilities.scatter_add_(1, index, probabilities.new_full(index.shape, -1)))
    return torch.cat(losses)
