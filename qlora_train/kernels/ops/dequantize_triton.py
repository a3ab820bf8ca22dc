"""4-bit weights of bitsandbytes dequantised in one pass: codes and both levels of scales in, finished weights out.

    w_i = codebook[code_i] * absmax_b          absmax_b = table[index_b] * scale_(b // 256) + offset  where double-quantised

A block's scale lives in registers alone; bitsandbytes writes all of them to memory as float32 and reads them back. The
formulas are those of `tests.support.nf4_reference`, with each product and sum rounded to float32 as there.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_BYTES = 2048
"""Packed bytes that one program reads, where a block has no more of them."""
STORED: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _dequantize(
    out,
    packed,
    codebook,
    absmax,
    table,
    scales,
    offset,
    num_elements,
    num_bytes,
    num_columns,
    row_stride,
    nested_block_size,
    NESTED: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ROUNDED_TO: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)
    is_block = block * (2 * BLOCK_BYTES) < num_elements
    if NESTED:
        index = tl.load(absmax + block, is_block, other=0).to(tl.int32)
        scale = tl.load(table + index) * tl.load(scales + block // nested_block_size, is_block, other=0.0)
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(absmax + block, is_block, other=0.0)

    byte = block[:, None] * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
    codes = tl.load(packed + byte, byte < num_bytes, other=0).to(tl.int32)
    high = tl.load(codebook + (codes >> 4)) * scale[:, None]
    low = tl.load(codebook + (codes & 0xF)) * scale[:, None]
    weights = tl.reshape(tl.join(high, low), (NUM_BLOCKS, 2 * BLOCK_BYTES))

    element = block[:, None] * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)[None, :]
    place = element
    if not CONTIGUOUS:
        place = element // num_columns * row_stride + element % num_columns
    tl.store(out + place, weights.to(ROUNDED_TO).to(out.dtype.element_ty), element < num_elements)


def _write(
    out: Tensor,
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    rounded_to: torch.dtype,
    table: Tensor | None,
    scales: Tensor | None,
    offset: Tensor | None,
    nested_block_size: int,
) -> None:
    """Write the weights into `out`, contiguous, or (rows, columns) with contiguous rows.

    Args:
        packed: the codes, two in a byte, as bytes or as any wider dtype.
        codebook: (16,) float32.
        absmax: (blocks,), float32, or with `table` the uint8 indices into it.
        block_size: numbers of a block, a power of two.
        rounded_to: the dtype the weights have in bitsandbytes: they are rounded to it first, then to that of `out`.
        table: (256,) float32, the values of a double-quantised absmax.
        scales: (ceil(blocks / nested_block_size),) float32.
        offset: () float32, the mean of the absmax.
        nested_block_size: blocks that share one of `scales`.
    """
    is_contiguous = out.is_contiguous()
    assert is_contiguous or (out.ndim == 2 and out.stride(1) == 1), "a row of the output is contiguous"
    codes = packed.contiguous().view(torch.uint8)
    assert out.numel() <= 2 * codes.numel(), "every weight has its code"
    assert out.numel() <= block_size * absmax.numel(), "every block has its scale"
    assert scales is None or absmax.numel() <= nested_block_size * scales.numel(), "every scale has that of its own"
    if not out.is_inference():  # which autograd does not follow
        torch.autograd.graph.increment_version(out)
    block_bytes = block_size // 2
    num_blocks = max(1, NUM_BYTES // block_bytes)
    nested = table is not None
    with torch.cuda.device_of(out):
        _dequantize[(triton.cdiv(out.numel(), num_blocks * block_size),)](
            out,
            codes,
            codebook,
            absmax if nested else absmax.float(),
            table,
            scales,
            offset,
            out.numel(),
            triton.cdiv(out.numel(), 2),
            1 if is_contiguous else out.shape[1],
            1 if is_contiguous else out.stride(0),
            nested_block_size,
            NESTED=nested,
            CONTIGUOUS=is_contiguous,
            ROUNDED_TO=STORED[rounded_to],
            NUM_BLOCKS=num_blocks,
            BLOCK_BYTES=block_bytes,
            enable_fp_fusion=False,
        )


def _make(
    packed: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    shape: list[int],
    rounded_to: torch.dtype,
    dtype: torch.dtype,
    table: Tensor | None,
    scales: Tensor | None,
    offset: Tensor | None,
    nested_block_size: int,
) -> Tensor:
    """Return the weights, `shape` in `dtype`; the other arguments are those of `_write`."""
    out = packed.new_empty(shape, dtype=dtype)
    _write(out, packed, codebook, absmax, block_size, rounded_to, table, scales, offset, nested_block_size)
    return out


def _make_fake(packed: Tensor, *others: Any) -> Tensor:
    """Return an empty tensor of the shape and dtype that `_make` returns for these arguments."""
    _codebook, _absmax, _block_size, shape, _rounded_to, dtype, *_nested = others
    return packed.new_empty(shape, dtype=dtype)


# by schema: torch.library.custom_op derives the same from the annotations, and takes 60 µs of the CPU longer for each call
CODES = "Tensor packed, Tensor codebook, Tensor absmax, int block_size"
NESTED = "Tensor? table, Tensor? scales, Tensor? offset, int nested_block_size"
torch.library.define(
    "qlora_train::dequantize_4bit_into", f"(Tensor(a!) out, {CODES}, ScalarType rounded_to, {NESTED}) -> ()"
)
torch.library.define(
    "qlora_train::dequantize_4bit",
    f"({CODES}, SymInt[] shape, ScalarType rounded_to, ScalarType dtype, {NESTED}) -> Tensor",
)
torch.library.impl("qlora_train::dequantize_4bit_into", "CompositeExplicitAutograd", _write)
torch.library.impl("qlora_train::dequantize_4bit", "CompositeExplicitAutograd", _make)
torch.library.register_fake("qlora_train::dequantize_4bit_into", lambda *_: None)
torch.library.register_fake("qlora_train::dequantize_4bit", _make_fake)

dequantize_into: Callable[..., None] = torch.ops.qlora_train.dequantize_4bit_into.default
"""`_write`, as an operator that torch.compile and CUDA graphs take whole."""
dequantize: Callable[..., Tensor] = torch.ops.qlora_train.dequantize_4bit.default
"""`_make`, likewise."""
