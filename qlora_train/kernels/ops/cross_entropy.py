"""Cross-entropy of logits and its gradient, made together: every loss depends on its own row of logits alone.

    loss = log(sum(exp z)) - z_target        dz = softmax(z) - 1 at the target

in float32, of logits of any dtype. The gradient takes the place of the logits: neither a float32 copy of them nor a second
tensor of their size is made. A kernel does it on GPUs that have Triton; plain torch does it a few rows at a time.
"""

import torch
from torch import Tensor

from qlora_train.kernels.ops import dispatch

PIECE_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Most float32 numbers at once: what stays in a core's cache; what keeps a GPU busy."""


def losses_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each row, float32 (rows,); `logits` become the gradient of their sum.

    Args:
        logits: (rows, vocabulary), floating point.
        targets: int64 (rows,).
    """
    if dispatch.runs_triton(logits):
        from qlora_train.kernels.ops import cross_entropy_triton as kernels

        return kernels.losses_and_gradient_(logits, targets)
    return plain_(logits, targets)


def plain_(logits: Tensor, targets: Tensor) -> Tensor:
    """Do the same in plain torch."""
    losses = []
    num_rows = max(1, PIECE_BYTES["cuda" if logits.is_cuda else "cpu"] // (4 * logits.shape[-1]))
    for some, places in zip(logits.split(num_rows), targets[:, None].split(num_rows), strict=True):
        shifted = some.to(torch.float32, copy=True)
        shifted.sub_(shifted.amax(-1, keepdim=True))
        wanted = shifted.gather(1, places)
        exponentials = shifted.exp_()
        total = exponentials.sum(-1, keepdim=True)
        losses.append((total.log() - wanted)[:, 0])
        probabilities = exponentials.div_(total)
        some.copy_(probabilities.scatter_add_(1, places, probabilities.new_full(places.shape, -1)))
    return torch.cat(losses)
