"""Time the Triton kernels on this GPU: dequantisation against bitsandbytes, the other operations against plain torch.

The shapes are those of Llama 3 8B. Times are medians over CUDA events with a cold L2 cache; GB/s counts what has to be read
and written once. ``--dry-run`` computes small shapes by Triton's interpreter, on any machine: it says whether every row can
be computed, and nothing about speed.

Example: ``python scripts/bench_kernels.py``
"""

import os
import sys

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from qlora_train.kernels.ops import cross_entropy, gated, rms_norm, rotary
from qlora_train.kernels.ops import cross_entropy_triton as cross_entropy_kernels
from qlora_train.kernels.ops import gated_triton as gated_kernels
from qlora_train.kernels.ops import rms_norm_triton as rms_norm_kernels
from qlora_train.kernels.ops import rotary_triton as rotary_kernels
from qlora_train.kernels.ops.dequantize import by_triton

HIDDEN, INTERMEDIATE, KEY_VALUE, HEADS, HEAD_FEATURES, VOCABULARY = 4096, 14336, 1024, 32, 128, 128256
LAYERS = {
    "q, o": (HIDDEN, HIDDEN),
    "k, v": (KEY_VALUE, HIDDEN),
    "gate, up": (INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
"""(out, in) of the linear layers."""
SMALLER = 32
"""By how much a dry run divides sizes."""


@dataclass(frozen=True)
class Race:
    """One row of the table.

    Attributes:
        kernel: computes it by Triton, into as many tensors as the other.
        other: computes the same by what stands beside it.
        num_bytes: what both have to read and write.
    """

    name: str
    kernel: Callable[[], tuple[Tensor, ...]]
    other: Callable[[], tuple[Tensor, ...]]
    num_bytes: int


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch (default: %(default)s)")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device: only --dry-run works on this machine")
    device = torch.device("cpu" if options.dry_run else "cuda")
    print(f"{'dry run' if options.dry_run else torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    print(f"{'':28} {'kernel':>10} {'other':>10} {'kernel':>10} {'other':>10} {'':>7} {'largest'}")
    print(f"{'':28} {'µs':>10} {'µs':>10} {'GB/s':>10} {'GB/s':>10} {'ratio':>7} {'difference'}")
    smaller = SMALLER if options.dry_run else 1
    for race in (*dequantisations(device, smaller), *operations(device, options.tokens // smaller, smaller)):
        differences = [
            float((one.float() - other.float()).abs().max())
            for one, other in zip(race.kernel(), race.other(), strict=True)
        ]
        kernel, other = (median_seconds(each, device) for each in (race.kernel, race.other))
        print(
            f"{race.name:28} {kernel * 1e6:10.1f} {other * 1e6:10.1f} {race.num_bytes / kernel / 1e9:10.1f}"
            f" {race.num_bytes / other / 1e9:10.1f} {other / kernel:7.2f} {max(differences):.1e}"
        )


def median_seconds(compute: Callable[[], object], device: torch.device) -> float:
    """Return how long it takes."""
    if device.type == "cuda":
        from triton.testing import do_bench

        milliseconds: float = do_bench(compute, warmup=100, rep=500, return_mode="median")
        return milliseconds / 1e3
    started = time.perf_counter()
    compute()
    return time.perf_counter() - started


def dequantisations(device: torch.device, smaller: int) -> Iterator[Race]:
    """Yield the linear layers of a block, as the loader stores them."""
    for name, shape in LAYERS.items():
        weight = torch.randn(*(size // smaller for size in shape), device=device, dtype=torch.bfloat16)
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        tensors = (packed, state.absmax, state.state2.absmax, weight)
        yield Race(
            f"dequantise {name}",
            lambda packed=packed, state=state: (by_triton(packed, state, torch.bfloat16, None),),
            lambda packed=packed, state=state: (dequantize_4bit(packed, state),),
            sum(tensor.nbytes for tensor in tensors),
        )


def operations(device: torch.device, tokens: int, smaller: int) -> Iterator[Race]:
    """Yield the operations of a block on a batch, forward and backward."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, grad, weight = numbers(tokens, HIDDEN // smaller), numbers(tokens, HIDDEN // smaller), numbers(HIDDEN // smaller)
    variant = rms_norm.Variant(0.0, rounds_first=True)
    scale = rms_norm.REFERENCE.forward(x, weight, 1e-5, variant)[1]
    yield Race(
        "RMS norm, forward",
        lambda: rms_norm_kernels.forward(x, weight, 1e-5, variant),
        lambda: rms_norm.REFERENCE.forward(x, weight, 1e-5, variant),
        2 * x.nbytes,
    )
    yield Race(
        "RMS norm, backward",
        lambda: (rms_norm_kernels.backward(grad, x, weight, scale, variant),),
        lambda: (rms_norm.REFERENCE.backward(grad, x, weight, scale, variant),),
        3 * x.nbytes,
    )

    gate, up, grad_product = (numbers(tokens, INTERMEDIATE // smaller) for _ in range(3))
    silu = gated.ACTIVATIONS["silu"]

    def both_passes() -> tuple[Tensor, ...]:
        product, gradients = gated.REFERENCE.recompute(gate, up, silu)
        return (product, *gradients(grad_product.clone()))

    yield Race(
        "silu(gate) * up, forward",
        lambda: (gated_kernels.forward(gate, up, "silu"),),
        lambda: (gated.REFERENCE.forward(gate, up, silu),),
        3 * gate.nbytes,
    )
    yield Race(
        "silu(gate) * up, backward",
        lambda: (
            gated_kernels.forward(gate, up, "silu"),
            *gated_kernels.backward(grad_product.clone(), gate, up, "silu"),
        ),
        both_passes,
        8 * gate.nbytes,  # with the copy of the gradient, which the plain code overwrites
    )

    heads = numbers(1, tokens, HEADS, HEAD_FEATURES // smaller).transpose(1, 2)
    cos, sin = numbers(1, 1, tokens, HEAD_FEATURES // smaller), numbers(1, 1, tokens, HEAD_FEATURES // smaller)
    for name in ("forward", "backward"):
        kernel, plain = getattr(rotary_kernels, name), getattr(rotary.REFERENCE, name)
        yield Race(
            f"rotary embedding, {name}",
            lambda kernel=kernel: (kernel(heads, cos, sin),),
            lambda plain=plain: (plain(heads, cos, sin),),
            2 * heads.nbytes + cos.nbytes + sin.nbytes,
        )

    logits = numbers(tokens // 4, VOCABULARY // smaller)
    targets = torch.arange(len(logits), device=device)
    yield Race(
        "cross-entropy, with gradient",
        lambda: cross_entropy_of(cross_entropy_kernels.losses_and_gradient_, logits, targets),
        lambda: cross_entropy_of(cross_entropy.reference_, logits, targets),
        5 * logits.nbytes,  # with the copy, which the gradient overwrites
    )


def cross_entropy_of(
    compute: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the losses and the gradient of logits, which stay."""
    gradient = logits.clone()
    return compute(gradient, targets), gradient


if __name__ == "__main__":
    main()
