"""Cross-entropy and its gradient in two passes over a row: `cross_entropy` is the reference.

The first pass keeps a running max and sum of exponentials (online softmax, Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867); the second overwrites the logits with the gradient. Only registers are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_ELEMENTS = 4096
"""Logits per iteration of a program."""
NUM_WARPS = 8


@triton.jit
def _losses_and_gradient(losses, logits, targets, row_stride, vocab_size, NUM_ELEMENTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * row_stride
    target = tl.load(targets + row)
    target_logit = tl.load(first + target).to(tl.float32)  # before any thread writes
    running_max = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for begin in range(0, vocab_size, NUM_ELEMENTS):
        index = begin + tl.arange(0, NUM_ELEMENTS)
        chunk = tl.load(first + index, index < vocab_size, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(running_max, tl.max(chunk, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # all logits so far are -inf
        total = total * tl.exp(running_max - shift) + tl.sum(tl.exp(chunk - shift), 0)
        running_max = new_max
    log_total = running_max + tl.log(total)
    tl.store(losses + row, log_total - target_logit)
    for begin in range(0, vocab_size, NUM_ELEMENTS):
        index = begin + tl.arange(0, NUM_ELEMENTS)
        chunk = tl.load(first + index, index < vocab_size, other=0.0)
        probability = tl.exp(chunk.to(tl.float32) - log_total)
        gradient = tl.where(index == target, probability - 1.0, probability)
        tl.store(first + index, gradient.to(chunk.dtype), index < vocab_size)


def losses_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each row, float32 (rows,); `logits`, (rows, vocabulary), become the gradient of their sum."""
    assert logits.stride(1) == 1, "rows are contiguous"
    if not logits.is_inference():  # inference tensors have no version
        torch.autograd.graph.increment_version(logits)
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _losses_and_gradient[(len(logits),)](
            losses, logits, targets, logits.stride(0), logits.shape[1],
            NUM_ELEMENTS=NUM_ELEMENTS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return losses
