"""LoRA dropout: y = x W' + (m * x) ((s / (1 - p)) A)' B', with a binary mask m, P(m = 0) = p.

Layers that read the same input share one mask, so that their A stay one matmul and one mask is drawn and saved. PEFT draws
one per layer: the expectation is the same, but here the noise of q, k and v is correlated.

Each mask is seeded from torch's default CPU generator, on a GPU too: resuming and activation checkpointing restore that
generator, while checkpointing restores a GPU's only for the devices of its positional arguments.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

MAX_RATE = 0.99
"""Largest p: a random byte resolves at most 255 / 256."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By itemsize: a CPU multiplies integers by a mask in a third of the time of floats."""


def draw_mask(num_rows: int, features: int, rate: float, device: torch.device) -> Tensor | None:
    """Return m, uint8 (rows, features); None for a rate of 0.

    Random bytes are compared with 256 p, randomly rounded up or down per row: P(m = 0) is exactly p. Drawn as int64, they
    take a CPU a tenth of the time of `bernoulli_`.
    """
    if rate == 0:
        return None
    generator = torch.Generator(device).manual_seed(int(torch.randint(2**63 - 1, ())))
    numel = num_rows * features
    words = torch.empty(-(-numel // 8), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    thresholds = torch.rand(num_rows, 1, device=device, generator=generator).add_(256 * rate).to(torch.uint8)
    return words.view(torch.uint8)[:numel].view(num_rows, features).ge_(thresholds)


def masked_(x: Tensor, mask: Tensor | None) -> Tensor:
    """Multiply x, (rows, features), by its mask in place, and return it."""
    if mask is not None:
        x.view(INTEGERS[x.dtype.itemsize]).mul_(mask)
    return x


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return m * x; x itself without a mask."""
    return x if mask is None else masked_(x.clone(), mask)


def rate_of(layer: LoraLayer, adapter: str) -> float:
    """Return p of an adapted layer in its current mode: 0 in evaluation."""
    module = layer.lora_dropout[adapter]
    return float(module.p) if isinstance(module, nn.Dropout) and module.training else 0.0


@contextmanager
def lora_dropout_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Temporarily set p of these modules' LoRA dropout to 0; other dropouts stay."""
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    dropouts = [each for layer in layers for each in layer.lora_dropout.values() if isinstance(each, nn.Dropout)]
    rates = [dropout.p for dropout in dropouts]
    for dropout in dropouts:
        dropout.p = 0.0
    try:
        yield
    finally:
        for dropout, rate in zip(dropouts, rates, strict=True):
            dropout.p = rate
