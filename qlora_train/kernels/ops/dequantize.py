"""Dequantization of bitsandbytes' 4-bit weights: by one Triton kernel on a GPU, by bitsandbytes elsewhere."""

import copy

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
from torch import Tensor

from qlora_train.kernels.ops.dispatch import has_kernels


def dequantize(packed: Tensor, quant_state: QuantState, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Return the weights, rounded to the dtype of the quantization state first, as in bitsandbytes, and then to `dtype`.

    Args:
        packed: (bytes, 1), two codes per byte, of any dtype.
        quant_state: the scales, single or double-quantized, and the shape of the weights.
        dtype: of the result.
        out: where to write them, of `dtype` and with contiguous rows.
    """
    if has_kernels(packed):
        return by_triton(packed, quant_state, dtype, out)
    weights = by_bitsandbytes(packed, quant_state).to(dtype)
    return weights if out is None else out.copy_(weights)


def by_bitsandbytes(packed: Tensor, quant_state: QuantState) -> Tensor:
    """Return the weights in the dtype of the quantization state."""
    flat = quant_state
    if not packed.is_cuda and quant_state.shape[-1] % quant_state.blocksize:
        # on CPUs bitsandbytes 0.50 starts a block at each row, which is wrong unless rows are whole blocks
        flat = copy.copy(quant_state)
        flat.shape = torch.Size([quant_state.shape.numel()])
    weights: Tensor = dequantize_4bit(packed, flat)
    return weights.view(quant_state.shape)


def by_triton(packed: Tensor, quant_state: QuantState, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    from qlora_train.kernels.ops.dequantize_triton import DoubleQuantized, dequantize_into

    second = quant_state.state2 if quant_state.nested else None
    double = second and DoubleQuantized(second.code, second.absmax, quant_state.offset, second.blocksize)
    codebook = quant_state.code
    if codebook is None:
        codebook = get_4bit_type(quant_state.quant_type, device=packed.device)
    if out is None:
        out = packed.new_empty(quant_state.shape, dtype=dtype)
    assert (out.shape, out.dtype) == (torch.Size(quant_state.shape), dtype), (
        "out has the shape and dtype of the weights"
    )
    dequantize_into(out, packed, codebook, quant_state.absmax, quant_state.blocksize, quant_state.dtype, double)
    return out
