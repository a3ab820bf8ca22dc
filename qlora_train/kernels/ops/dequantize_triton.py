"""Dequantization of bitsandbytes' 4-bit weights in one pass, both levels of scales included.

    w_i = codebook[code_i] * absmax_b          absmax_b = table[index_b] * scale_(b // 256) + offset  if double-quantized

A block's scale stays in registers; bitsandbytes writes all of them to memory as float32 and reads them back. The formulas
are those of `tests.support.nf4_reference`, each product and sum rounded to float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_BYTES = 2048
"""Packed bytes per program, unless a block has more."""
TL_DTYPES: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class DoubleQuantized(NamedTuple):
    """What the uint8 absmax of a double-quantized weight index and are scaled by.

    Attributes:
        table: (256,) float32.
        scales: (ceil(blocks / block_size),) float32.
        offset: () float32, the mean of the absmax.
        block_size: blocks per scale.
    """

    table: Tensor
    scales: Tensor
    offset: Tensor
    block_size: int


@triton.jit
def _dequantize(
    out, packed, codebook, absmax, table, scales, offset,
    num_elements, num_bytes, num_columns, row_stride, double_block_size,
    DOUBLE: tl.constexpr, CONTIGUOUS: tl.constexpr, ROUNDED_TO: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)
    is_block = block * (2 * BLOCK_BYTES) < num_elements
    if DOUBLE:
        index = tl.load(absmax + block, is_block, other=0).to(tl.int32)
        scale = tl.load(table + index) * tl.load(scales + block // double_block_size, is_block, other=0.0)
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(absmax + block, is_block, other=0.0)

    byte = block[:, None] * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
    codes = tl.load(packed + byte, byte < num_bytes, other=0).to(tl.int32)
    high = tl.load(codebook + (codes >> 4)) * scale[:, None]
    low = tl.load(codebook + (codes & 0xF)) * scale[:, None]
    weights = tl.reshape(tl.join(high, low), (NUM_BLOCKS, 2 * BLOCK_BYTES))

    element = block[:, None] * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)[None, :]
    target = element
    if not CONTIGUOUS:
        target = element // num_columns * row_stride + element % num_columns
    tl.store(out + target, weights.to(ROUNDED_TO).to(out.dtype.element_ty), element < num_elements)


def dequantize_into(
    out: Tensor,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    rounded_to: torch.dtype,
    double: DoubleQuantized | None,
) -> None:
    """Write the weights into `out`, contiguous, or (rows, columns) with contiguous rows.

    Args:
        out: any floating dtype.
        packed: two codes per byte, of any dtype.
        codebook: (16,) float32.
        absmax: (blocks,), float32, or uint8 if double-quantized.
        block_size: weights per block, a power of two.
        rounded_to: the dtype to round to before that of `out`.
        double: None for single quantization.
    """
    is_contiguous = out.is_contiguous()
    assert is_contiguous or (out.ndim == 2 and out.stride(1) == 1), "rows of the output are contiguous"
    codes = packed.contiguous().view(torch.uint8)
    table, scales, offset, double_block_size = double or (None, None, None, 1)
    assert out.numel() <= 2 * codes.numel(), "every weight has a code"
    assert out.numel() <= block_size * absmax.numel(), "every block has a scale"
    assert scales is None or absmax.numel() <= double_block_size * scales.numel(), "every absmax has a scale"
    if not out.is_inference():  # inference tensors have no version
        torch.autograd.graph.increment_version(out)
    block_bytes = block_size // 2
    num_blocks = max(1, NUM_BYTES // block_bytes)
    rows = (1, 1) if is_contiguous else (out.shape[1], out.stride(0))
    with torch.cuda.device_of(out):
        _dequantize[(triton.cdiv(out.numel(), num_blocks * block_size),)](
            out, codes, codebook, absmax if double else absmax.float(), table, scales, offset,
            out.numel(), triton.cdiv(out.numel(), 2), *rows, double_block_size,
            DOUBLE=double is not None, CONTIGUOUS=is_contiguous, ROUNDED_TO=TL_DTYPES[rounded_to],
            NUM_BLOCKS=num_blocks, BLOCK_BYTES=block_bytes, enable_fp_fusion=False,
        )  # fmt: skip
