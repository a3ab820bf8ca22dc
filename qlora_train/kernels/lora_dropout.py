"""LoRA dropout: y = x W' + (m * x) ((s / (1 - p)) A)' B', with a mask m of zeros and ones, P(m = 0) = p.

All layers that read the same input share one mask, so that their A stay one product and one mask is drawn and saved. PEFT
draws one for each layer: the expectation is the same, the noise of q, k and v is correlated here.

The seed of each mask comes from torch's default CPU generator, on a GPU too: resuming and activation checkpointing restore
it, but checkpointing restores a GPU's for positional arguments alone. One byte per number is saved for the backward pass.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

MAX_RATE = 0.99
"""The largest p here: a random byte can give no more than 255 / 256."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes per number. Their product with a mask takes a CPU a third of the time of a floating-point one."""


def draw_mask(rows: int, features: int, rate: float, device: torch.device) -> Tensor | None:
    """Return m, uint8 (rows, features); None for a rate of 0.

    A random byte per number is compared with 256 p, which each row rounds up or down at random: P(m = 0) is exactly p.
    Drawn as 64-bit integers, bytes take a CPU a tenth of the time of `bernoulli_`.
    """
    if rate == 0:
        return None
    generator = torch.Generator(device).manual_seed(int(torch.randint(2**63 - 1, ())))
    numel = rows * features
    words = torch.empty(-(-numel // 8), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    thresholds = torch.rand(rows, 1, device=device, generator=generator).add_(256 * rate).to(torch.uint8)
    return words.view(torch.uint8)[:numel].view(rows, features).ge_(thresholds)


def masked_(x: Tensor, mask: Tensor | None) -> Tensor:
    """Multiply x, (rows, features), by its mask in place, and return it."""
    if mask is not None:
        x.view(INTEGERS[x.dtype.itemsize]).mul_(mask)
    return x


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return m * x; x itself where there is no mask."""
    return x if mask is None else masked_(x.clone(), mask)


def rate_of(layer: LoraLayer, adapter: str) -> float:
    """Return p of an adapted layer now: 0 in evaluation mode."""
    module = layer.lora_dropout[adapter]
    return float(module.p) if isinstance(module, nn.Dropout) and module.training else 0.0


@contextmanager
def lora_dropout_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set p of these modules' LoRA dropout to 0 for a while; all other dropouts stay."""
    found = [
        dropout
        for module in modules
        if isinstance(module, LoraLayer)
        for dropout in module.lora_dropout.values()
        if isinstance(dropout, nn.Dropout)
    ]
    rates = [dropout.p for dropout in found]
    for dropout in found:
        dropout.p = 0.0
    try:
        yield
    finally:
        for dropout, rate in zip(found, rates, strict=True):
            dropout.p = rate
