"""The weights that bitsandbytes stores in 4 bits, dequantised: by one Triton kernel on a GPU, by bitsandbytes elsewhere."""

import copy

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
from torch import Tensor

from qlora_train.kernels.ops.dispatch import has_kernels


def dequantize(packed: Tensor, quant_state: QuantState, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Return the weights, of the state's shape, in `dtype`.

    They are rounded to the state's own dtype first, as bitsandbytes returns them, and then to `dtype`.

    Args:
        packed: (bytes, 1), the codes, two in a byte, or wider numbers of the same bytes.
        quant_state: the scales, single or double-quantised.
        out: where to write them and what to return, a tensor of `dtype` with contiguous rows; a new one without it.
    """
    if has_kernels(packed):
        return by_triton(packed, quant_state, dtype, out)
    weights = by_bitsandbytes(packed, quant_state).to(dtype)
    return weights if out is None else out.copy_(weights)


def by_bitsandbytes(packed: Tensor, quant_state: QuantState) -> Tensor:
    """Return the weights, of the state's shape, in the state's dtype.

    On CPUs bitsandbytes 0.50 takes each row to begin a block of its own, which is wrong where a row is no whole number of
    blocks: then the weights are dequantised as the one row of numbers that they are stored as.
    """
    flat = quant_state
    if not packed.is_cuda and quant_state.shape[-1] % quant_state.blocksize:
        flat = copy.copy(quant_state)
        flat.shape = torch.Size([quant_state.shape.numel()])
    weights: Tensor = dequantize_4bit(packed, flat)
    return weights.view(quant_state.shape)


def by_triton(packed: Tensor, quant_state: QuantState, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    from qlora_train.kernels.ops import dequantize_triton as kernel

    second = quant_state.state2 if quant_state.nested else None
    nested = (None, None, None, 1)
    if second is not None:
        nested = (second.code, second.absmax, quant_state.offset, second.blocksize)
    codebook = quant_state.code
    if codebook is None:
        codebook = get_4bit_type(quant_state.quant_type, device=packed.device)
    common = (packed, codebook, quant_state.absmax, quant_state.blocksize)
    if out is None:
        return kernel.dequantize(*common, list(quant_state.shape), quant_state.dtype, dtype, *nested)
    assert out.shape == torch.Size(quant_state.shape), "the weights have the shape of their place"
    assert out.dtype == dtype, "the weights have the dtype of their place"
    kernel.dequantize_into(out, *common, quant_state.dtype, *nested)
    return out
