"""Reference of 4-bit blockwise quantization in torch, for comparison with kernels and bitsandbytes.

QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) stores a weight in 4 bits. The weight is read as one row
of numbers and cut into blocks of 64; each block keeps its largest magnitude, and each number the index of the nearest
of 16 fixed values:

    absmax_b = max |x_i|                    over the 64 numbers of block b           float32
    code_i   = argmin_c |x_i / absmax_b - codebook_c|                                4 bits, two in a byte
    x̂_i      = codebook[code_i] * absmax_b

That is 4 + 32/64 = 4.5 bits a weight. Double quantization stores the absmax themselves in 8 bits, in blocks of 256
around their mean, which makes it 4 + 8/64 + 32/(64 * 256) = 4.127 bits:

    absmax_b ≈ mean(absmax) + dynamic_map[index_b] * scale_of_256

NF4 holds quantiles of the normal distribution, so that normal weights use each of the 16 values about equally often;
FP4 holds the values of a 4-bit float. This is the storage of bitsandbytes: codes and absmax are equal (FP4's two zeros
mean the same). Its index into the dynamic map may be the neighbouring one, because on CPUs it finds it through a table
that resolves about 2^-16 of the scale.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK_SIZE = 64
ABSMAX_BLOCK_SIZE = 256
QuantType = Literal["nf4", "fp4"]

# The published values (Appendix E of the paper); `derive_nf4_codebook` makes them from the normal distribution.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# One sign bit, then the 3-bit pattern of a float whose bits are not in the order of its values.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class QuantizedAbsmax:
    """Double-quantized block scales.

    Attributes:
        indices: (blocks,) uint8, into `dynamic_map()`.
        scales: (ceil(blocks / 256),) float32.
        offset: () float32, the mean of the absmax.
    """

    indices: Tensor
    scales: Tensor
    offset: Tensor


def nf4_codebook() -> Tensor:
    """Return the 16 NF4 values in ascending order, (16,) float32; zero is index 7."""
    return torch.tensor(_NF4, dtype=torch.float32)


def derive_nf4_codebook() -> Tensor:
    """Compute the NF4 values from quantiles of the normal distribution, (16,) float64.

    Eight positive and seven negative quantiles at equal distances of probability, an exact zero between them, all
    divided by the largest (Section 3 of the paper). The outermost probability is the mean of 1 - 1/32 and 1 - 1/30, the
    middle of the outermost of 16 and of 15 equally probable bins.
    """
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2

    def quantiles(number: int) -> Tensor:
        probabilities = torch.linspace(outermost, 0.5, number + 1, dtype=torch.float64)[:-1]
        return torch.special.ndtri(probabilities)

    zero = torch.zeros(1, dtype=torch.float64)
    values = torch.cat([-quantiles(7), zero, quantiles(8).flip(0)])
    return values / values.abs().max()


def fp4_codebook() -> Tensor:
    """Return the 16 FP4 values by bit pattern, (16,) float32: index 0 is 0.0 and index 8 is -0.0."""
    magnitudes = torch.tensor(_FP4_MAGNITUDES, dtype=torch.float32) / 12.0
    return torch.cat([magnitudes, -magnitudes])


def codebook(quant_type: QuantType) -> Tensor:
    """Return the 16 values of a 4-bit type, (16,) float32."""
    return {"nf4": nf4_codebook, "fp4": fp4_codebook}[quant_type]()


def dynamic_map() -> Tensor:
    """Return the 256 values of the signed 8-bit dynamic type in ascending order, (256,) float32.

    Decade e (of 7, the last one ending at 1) is cut into 2^e equal parts, whose middles are the values, with both
    signs; 0 and 1 complete the 256 (https://arxiv.org/abs/2110.02861).
    """
    decades = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    magnitudes = torch.cat(decades)
    return torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, 1.0])]).sort().values


def _nearest(scaled: Tensor, values: Tensor) -> Tensor:
    """Return the index of the nearest value for each number, same shape, int64; the lower index wins a tie."""
    order = values.argsort(stable=True)
    ascending = values[order]
    index = torch.searchsorted((ascending[:-1] + ascending[1:]) / 2, scaled.contiguous())
    return order[index]


def _blocks(flat: Tensor, block_size: int) -> Tensor:
    """Cut (n,) into (ceil(n / block_size), block_size), the last block filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)


def _scaled_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return blocks divided by their largest magnitude, and those magnitudes; a block of zeros stays zeros."""
    blocks = _blocks(flat, block_size)
    absmax = blocks.abs().amax(dim=1)
    # the reciprocal is rounded before the product, as compiled kernels do it: this decides ties
    return blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1), absmax


def quantize_4bit(x: Tensor, quant_type: QuantType = "nf4", block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """Quantize a tensor.

    Args:
        x: any shape, n values, floating point.
        quant_type: `nf4` or `fp4`.
        block_size: values per scale.

    Returns:
        packed: (ceil(n / 2),) uint8; the first value of a pair is in the high four bits.
        absmax: (ceil(n / block_size),) float32.
    """
    flat = x.detach().reshape(-1).float()
    scaled, absmax = _scaled_blocks(flat, block_size)
    codes = _nearest(scaled, codebook(quant_type).to(x.device)).reshape(-1)[: flat.numel()].to(torch.uint8)
    pairs = _blocks(codes, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1], absmax


def unpack_codes(packed: Tensor) -> Tensor:
    """Return the 4-bit codes of packed bytes, (2 * bytes,) uint8, high half first."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 0xF], dim=1).reshape(-1)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, ...],
    quant_type: QuantType = "nf4",
    *,
    block_size: int = BLOCK_SIZE,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the tensor that `quantize_4bit` stored: codebook value times block scale, rounded once to `dtype`.

    Args:
        packed: (ceil(n / 2),) or (ceil(n / 2), 1) uint8.
        absmax: (ceil(n / block_size),) float32.
        shape: of the result, n values.
    """
    number = torch.Size(shape).numel()
    values = codebook(quant_type).to(packed.device)[unpack_codes(packed)[:number].long()]
    return (_blocks(values, block_size) * absmax.unsqueeze(1)).reshape(-1)[:number].reshape(shape).to(dtype)


def double_quantize(absmax: Tensor) -> QuantizedAbsmax:
    """Quantize block scales to 8 bits, in blocks of 256 around their mean.

    Args:
        absmax: (blocks,) float32.
    """
    offset = absmax.mean()
    scaled, scales = _scaled_blocks(absmax - offset, ABSMAX_BLOCK_SIZE)
    indices = _nearest(scaled, dynamic_map().to(absmax.device)).reshape(-1)[: absmax.numel()]
    return QuantizedAbsmax(indices.to(torch.uint8), scales, offset)


def double_dequantize(quantized: QuantizedAbsmax) -> Tensor:
    """Return the block scales that `double_quantize` stored, (blocks,) float32."""
    values = dynamic_map().to(quantized.indices.device)[quantized.indices.long()]
    scaled = _blocks(values, ABSMAX_BLOCK_SIZE) * quantized.scales.unsqueeze(1)
    return scaled.reshape(-1)[: quantized.indices.numel()] + quantized.offset
