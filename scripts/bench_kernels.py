"""Time the Triton kernels on this GPU: dequantization against bitsandbytes, other operations against their references.

Shapes are those of Llama 3 8B. Times are medians over CUDA events with a cold L2 cache; GB/s counts required reads and
writes once. ``--dry-run`` runs small shapes in Triton's interpreter, on any machine: it checks that every row of the table
can be computed, not speed.

Example: ``python scripts/bench_kernels.py``
"""

import os
import sys

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from qlora_train.kernels.ops import (
    cross_entropy,
    cross_entropy_triton,
    gated,
    gated_triton,
    rms_norm,
    rms_norm_triton,
    rotary,
    rotary_triton,
)
from qlora_train.kernels.ops.dequantize import by_triton

HIDDEN, INTERMEDIATE, KEY_VALUE, HEADS, HEAD_DIM, VOCABULARY = 4096, 14336, 1024, 32, 128, 128256
LAYERS = {
    "q, o": (HIDDEN, HIDDEN),
    "k, v": (KEY_VALUE, HIDDEN),
    "gate, up": (INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
"""(out, in) of the linear layers."""
DRY_RUN_DIVISOR = 32
"""Sizes of a dry run are divided by it."""


@dataclass(frozen=True)
class Benchmark:
    """One row of the table: `kernel` and `reference` return equal tensors, and read and write `num_bytes`."""

    name: str
    kernel: Callable[[], tuple[Tensor, ...]]
    reference: Callable[[], tuple[Tensor, ...]]
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
    print(f"{'':28} {'kernel':>10} {'reference':>10} {'kernel':>10} {'reference':>10} {'':>7} {'max'}")
    print(f"{'':28} {'µs':>10} {'µs':>10} {'GB/s':>10} {'GB/s':>10} {'ratio':>7} {'difference'}")
    divisor = DRY_RUN_DIVISOR if options.dry_run else 1
    for bench in (*dequantization(device, divisor), *operations(device, options.tokens // divisor, divisor)):
        pairs = zip(bench.kernel(), bench.reference(), strict=True)
        differences = [float((actual.float() - expected.float()).abs().max()) for actual, expected in pairs]
        kernel, reference = (median_seconds(each, device) for each in (bench.kernel, bench.reference))
        print(
            f"{bench.name:28} {kernel * 1e6:10.1f} {reference * 1e6:10.1f} {bench.num_bytes / kernel / 1e9:10.1f}"
            f" {bench.num_bytes / reference / 1e9:10.1f} {reference / kernel:7.2f} {max(differences):.1e}"
        )


def median_seconds(compute: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        milliseconds: float = do_bench(compute, warmup=100, rep=500, return_mode="median")
        return milliseconds / 1e3
    started = time.perf_counter()
    compute()
    return time.perf_counter() - started


def dequantization(device: torch.device, divisor: int) -> Iterator[Benchmark]:
    """Yield the linear layers of a block, quantized as by the loader."""
    for name, shape in LAYERS.items():
        weight = torch.randn(*(size // divisor for size in shape), device=device, dtype=torch.bfloat16)
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        tensors = (packed, state.absmax, state.state2.absmax, weight)
        yield Benchmark(
            f"dequantize {name}",
            lambda packed=packed, state=state: (by_triton(packed, state, torch.bfloat16, None),),
            lambda packed=packed, state=state: (dequantize_4bit(packed, state),),
            sum(tensor.nbytes for tensor in tensors),
        )


def operations(device: torch.device, tokens: int, divisor: int) -> Iterator[Benchmark]:
    """Yield the operations of a block, forward and backward."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, grad, weight = random(tokens, HIDDEN // divisor), random(tokens, HIDDEN // divisor), random(HIDDEN // divisor)
    variant = rms_norm.Variant(0.0, rounds_first=True)
    scale = rms_norm.REFERENCE.forward(x, weight, 1e-5, variant)[1]
    yield Benchmark(
        "RMS norm, forward",
        lambda: rms_norm_triton.forward(x, weight, 1e-5, variant),
        lambda: rms_norm.REFERENCE.forward(x, weight, 1e-5, variant),
        2 * x.nbytes,
    )
    yield Benchmark(
        "RMS norm, backward",
        lambda: (rms_norm_triton.backward(grad, x, weight, scale, variant),),
        lambda: (rms_norm.REFERENCE.backward(grad, x, weight, scale, variant),),
        3 * x.nbytes,
    )

    gate, up, grad_product = (random(tokens, INTERMEDIATE // divisor) for _ in range(3))
    silu = gated.ACTIVATIONS["silu"]

    def recompute() -> tuple[Tensor, ...]:
        product, gradients = gated.REFERENCE.recompute(gate, up, silu)
        return (product, *gradients(grad_product.clone()))

    yield Benchmark(
        "silu(gate) * up, forward",
        lambda: (gated_triton.forward(gate, up, "silu"),),
        lambda: (gated.REFERENCE.forward(gate, up, silu),),
        3 * gate.nbytes,
    )
    yield Benchmark(
        "silu(gate) * up, backward",
        lambda: (
            gated_triton.forward(gate, up, "silu"),
            *gated_triton.backward(grad_product.clone(), gate, up, "silu"),
        ),
        recompute,
        8 * gate.nbytes,  # with the copy of the gradient, which the reference overwrites
    )

    heads = random(1, tokens, HEADS, HEAD_DIM // divisor).transpose(1, 2)
    cos, sin = random(1, 1, tokens, HEAD_DIM // divisor), random(1, 1, tokens, HEAD_DIM // divisor)
    for name in ("forward", "backward"):
        kernel, reference = getattr(rotary_triton, name), getattr(rotary.REFERENCE, name)
        yield Benchmark(
            f"rotary embedding, {name}",
            lambda kernel=kernel: (kernel(heads, cos, sin),),
            lambda reference=reference: (reference(heads, cos, sin),),
            2 * heads.nbytes + cos.nbytes + sin.nbytes,
        )

    logits = random(tokens // 4, VOCABULARY // divisor)
    targets = torch.arange(len(logits), device=device)

    def with_gradient(compute: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        gradient = logits.clone()
        return compute(gradient, targets), gradient

    yield Benchmark(
        "cross-entropy, with gradient",
        lambda: with_gradient(cross_entropy_triton.losses_and_gradient_),
        lambda: with_gradient(cross_entropy.reference_),
        5 * logits.nbytes,  # with the copy, which the gradient overwrites
    )


if __name__ == "__main__":
    main()
