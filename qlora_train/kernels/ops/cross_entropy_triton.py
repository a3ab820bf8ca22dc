"""Cross-entropy and its gradient in two passes over a row: `cross_entropy` is the reference.

The first pass keeps the largest logit so far and the sum of exponentials below it (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867); the second writes the gradient over the logits. Nothing is float32 but what a program
has in its registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_ELEMENTS = 4096
"""Logits that a program reads at a time."""
NUM_WARPS = 8


@triton.jit
def _losses_and_gradient(losses, logits, targets, row_stride, num_words, NUM_ELEMENTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * row_stride
    target = tl.load(targets + row)
    of_target = tl.load(first + target).to(tl.float32)  # before any thread writes
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for begin in range(0, num_words, NUM_ELEMENTS):
        word = begin + tl.arange(0, NUM_ELEMENTS)
        some = tl.load(first + word, word < num_words, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(some, 0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # where no word so far is possible
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(some - shift), 0)
        largest = larger
    log_total = largest + tl.log(total)
    tl.store(losses + row, log_total - of_target)
    for begin in range(0, num_words, NUM_ELEMENTS):
        word = begin + tl.arange(0, NUM_ELEMENTS)
        some = tl.load(first + word, word < num_words, other=0.0)
        probability = tl.exp(some.to(tl.float32) - log_total)
        gradient = tl.where(word == target, probability - 1.0, probability)
        tl.store(first + word, gradient.to(some.dtype), word < num_words)


def losses_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each row, float32 (rows,); `logits`, (rows, vocabulary), become the gradient of their sum."""
    assert logits.stride(1) == 1, "the logits of a row lie side by side"
    if not logits.is_inference():  # which autograd does not follow
        torch.autograd.graph.increment_version(logits)
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _losses_and_gradient[(len(logits),)](
            losses, logits, targets, logits.stride(0), logits.shape[1],
            NUM_ELEMENTS=NUM_ELEMENTS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return losses
