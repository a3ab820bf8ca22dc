"""Products in float8 (e4m3), each row with a scale of its own, for devices that multiply it faster than bfloat16.

    x_t ≈ a_t x̂_t        W_o ≈ b_o Ŵ_o        (x W')_to ≈ a_t b_o sum_k x̂_tk Ŵ_ok        a_t = max |x_t| / 448, b_o likewise

with sums in float32 (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

NUMBERS = torch.float8_e4m3fn
LARGEST = torch.finfo(NUMBERS).max
OF_SIZE = 16
"""What the sizes of a weight are multiples of, as the products want it."""
TOLERANCE = 0.1
"""Largest difference of a product of normal numbers, as a share of its own size: rounding makes 0.04."""


class Float8(NamedTuple):
    """A matrix in float8.

    Attributes:
        numbers: (rows, columns), e4m3.
        scales: (rows, 1), float32.
    """

    numbers: Tensor
    scales: Tensor


def in_float8(matrix: Tensor) -> Float8:
    """Return a matrix, (rows, columns), rounded; a row of zeros stays one."""
    largest = matrix.abs().amax(-1, keepdim=True).float()
    scales = (largest / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return Float8((matrix / scales).to(NUMBERS), scales)


def product(x: Float8, weight: Float8) -> Tensor:
    """Return x W', bfloat16 (rows, out), for x of (rows, in) and W of (out, in)."""
    by_row = ScalingType.RowWise
    return scaled_mm(
        x.numbers, weight.numbers.T, x.scales, by_row, weight.scales.T, by_row,
        output_dtype=torch.bfloat16, use_fast_accum=x.numbers.is_cuda,
    )  # fmt: skip


@cache
def why_not_on(device: torch.device) -> str:
    """Try a product on a device, once; return why it does not compute them, empty where it does."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(4 * OF_SIZE, 4 * OF_SIZE, generator=generator).to(device) for _ in range(2))
    wanted = x @ weight.T
    try:
        found = product(in_float8(x.bfloat16()), in_float8(weight.bfloat16())).float()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).strip().splitlines()[0]
    differs = float((found - wanted).norm() / wanted.norm())
    return "" if differs <= TOLERANCE else f"products differ by {differs:.2g} of themselves"
