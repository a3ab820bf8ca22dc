"""Quantize this rank's blocks of a weight, with the codes and absmax that one process would compute.

    one process:  codes, a = quantize(W)                            absmax = quantize(a - mean(a))
    a rank:       codes_r, a_r = quantize(its blocks of W)          a = all-gather(a_r), then the same

Blocks are quantized independently, but double quantization subtracts the mean over a whole weight. So first-level absmax is
gathered: 1/16 byte per weight, for one weight at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise
from torch import Tensor

from qlora_train.kernels.block_sizes import ABSMAX_BLOCK_SIZE, BLOCK_SIZE
from qlora_train.kernels.sharded_weights import num_blocks
from qlora_train.models.shard_rows import gather_rows, own_rows

CHUNK_WEIGHTS = 1 << 22
"""Weights quantized at once, which bounds temporaries."""


@dataclass(frozen=True)
class QuantizedPart:
    """This rank's blocks of a stack of matrices.

    Attributes:
        codes: (blocks of this rank, 32) uint8.
        absmax: (blocks of this rank,), uint8 if double-quantized, else float32.
        states: of every matrix, with the absmax of all its blocks.
    """

    codes: Tensor
    absmax: Tensor
    states: tuple[QuantState, ...]


def own_weights(rows: Tensor, first_row: int, shape: torch.Size) -> Tensor:
    """Return the weights of this rank's blocks, flat.

    Args:
        rows: of the tensor, with all of those that hold the blocks.
        first_row: their first.
        shape: of the whole tensor.
    """
    blocks = own_rows(num_blocks(shape))
    skipped = first_row * shape[1:].numel()
    return rows.reshape(-1)[blocks.start * BLOCK_SIZE - skipped : blocks.stop * BLOCK_SIZE - skipped]


def rows_of_blocks(shape: torch.Size) -> range:
    """Return the rows of a tensor that hold weights of this rank's blocks."""
    blocks, row_size = own_rows(num_blocks(shape)), shape[1:].numel()
    return range(blocks.start * BLOCK_SIZE // row_size, -(-blocks.stop * BLOCK_SIZE // row_size))


def quantize_part(
    weights: Tensor,
    shape: torch.Size,
    *,
    quant_type: str,
    double_quant: bool,
    count: Callable[[Tensor], Tensor],
) -> QuantizedPart:
    """Quantize this rank's blocks; every rank calls it for the same weights in the same order.

    Args:
        weights: of this rank's blocks, flat.
        shape: (matrices, a, b) of the stack; each matrix is a whole number of blocks.
        quant_type: nf4 or fp4.
        double_quant: quantize absmax too.
        count: is called with each piece before it is quantized.
    """
    blocks = own_rows(num_blocks(shape))
    codes = weights.new_empty((len(weights) // BLOCK_SIZE, BLOCK_SIZE // 2), dtype=torch.uint8)
    first_level = weights.new_empty(len(codes), dtype=torch.float32)
    chunk = CHUNK_WEIGHTS // BLOCK_SIZE
    for begin in range(0, len(codes), chunk):
        piece = count(weights[begin * BLOCK_SIZE : (begin + chunk) * BLOCK_SIZE])
        packed, state = quantize_4bit(piece, blocksize=BLOCK_SIZE, quant_type=quant_type, compress_statistics=False)
        codes[begin : begin + chunk] = packed.view(-1, BLOCK_SIZE // 2)
        first_level[begin : begin + chunk] = state.absmax
    gathered = gather_rows(first_level, num_blocks(shape)).view(shape[0], -1)
    code = get_4bit_type(quant_type, device=weights.device)
    states = tuple(_state(absmax, shape[1:], weights.dtype, code, quant_type, double_quant) for absmax in gathered)
    absmax = torch.cat([state.absmax for state in states])[blocks.start : blocks.stop].clone()
    return QuantizedPart(codes, absmax, states)


def _state(
    absmax: Tensor, shape: torch.Size, dtype: torch.dtype, code: Tensor, quant_type: str, double_quant: bool
) -> QuantState:
    """Return the state that bitsandbytes' `quantize_4bit` makes from the first-level absmax."""
    nested = {}
    if double_quant:
        offset = absmax.mean()
        absmax, second = quantize_blockwise(absmax - offset, blocksize=ABSMAX_BLOCK_SIZE)
        nested = {"offset": offset, "state2": second}
    return QuantState(
        absmax=absmax, shape=shape, dtype=dtype, blocksize=BLOCK_SIZE, code=code, quant_type=quant_type, **nested
    )
