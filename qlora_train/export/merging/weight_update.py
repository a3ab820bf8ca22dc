"""The arithmetic of a merge: quantize to 4 bits and back as the run did, add the update in float32, round once.

The base's weights are 16-bit numbers, and most updates of a short run are smaller than half the distance to the next one:
rounding to nearest loses them. Stochastic rounding keeps them in the mean, and so in the sums of a matrix product.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from bitsandbytes.functional import quantize_4bit

from qlora_train.config.schema import QuantizationSection
from qlora_train.export.merging.adapter_deltas import AdapterFile, ExpertLowRank, LowRank, Replace, TokenRows, Update
from qlora_train.kernels.block_sizes import BLOCK_SIZE
from qlora_train.kernels.ops.dequantize import by_bitsandbytes

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Mantissa bits of float32 that a dtype lacks."""


@dataclass(frozen=True)
class QuantizationRoundTrip:
    """Quantize matrices to 4 bits and back, as a load in `load_dtype` does; computed on `device`.

    Attributes:
        names: parameters that the run held in 4 bits.
        transposed: those stored as (in, out), which bitsandbytes quantizes as (out, in).
    """

    names: frozenset[str]
    transposed: frozenset[str]
    quantization: QuantizationSection
    load_dtype: torch.dtype
    device: str

    def __call__(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """Return the dequantized matrix of a parameter, or the matrix itself if it was not in 4 bits."""
        if name not in self.names:
            return matrix
        if name in self.transposed:
            return self._round_trip(matrix.T).T
        return self._round_trip(matrix)

    def _round_trip(self, matrix: torch.Tensor) -> torch.Tensor:
        codes, state = quantize_4bit(
            matrix.to(self.device, self.load_dtype).contiguous(),
            blocksize=BLOCK_SIZE,
            compress_statistics=self.quantization.bnb_4bit_use_double_quant,
            quant_type=self.quantization.bnb_4bit_quant_type,
        )
        return by_bitsandbytes(codes, state).to("cpu")


def merge_parameter(
    adapter: AdapterFile,
    name: str,
    weight: torch.Tensor,
    update: Update | None,
    round_trip: QuantizationRoundTrip,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return a parameter to write, in `dtype`; `weight` of experts is (experts, ...)."""
    if not weight.is_floating_point():
        return weight
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if isinstance(update, ExpertLowRank) or (update is None and weight.ndim == 3):
        merged = torch.empty(weight.shape, dtype=dtype)
        deltas = repeat(None) if update is None else _expert_deltas(adapter, update)
        for target, matrix, delta in zip(
            merged, weight, deltas, strict=False
        ):  # float32 copies of one matrix at a time
            dequantized = round_trip(name, matrix).float()
            target.copy_(dequantized if delta is None else stochastic_round(dequantized + delta, dtype, generator))
        return merged
    updated = merge_tensor(adapter, update, round_trip(name, weight).float())
    return updated.to(dtype) if update is None else stochastic_round(updated, dtype, generator)


def stochastic_round(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Round float32 values to one of both neighbours in `dtype`, with the probabilities whose mean is the value.

    Values that `dtype` has are not changed. Exact for normal numbers of float16; its subnormal ones, below 6e-5, are
    rounded once more, to nearest.
    """
    if dtype not in DROPPED_BITS:
        return values.to(dtype)
    unit = 1 << DROPPED_BITS[dtype]
    # the bits of a float, as an integer, ascend with its magnitude: adding below one unit of `dtype` carries at random
    noise = torch.randint(unit, values.shape, generator=generator, dtype=torch.int32)
    bits = noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-unit)
    return bits.view(torch.float32).to(dtype)


def merge_tensor(
    adapter: AdapterFile, update: LowRank | Replace | TokenRows | None, weight: torch.Tensor
) -> torch.Tensor:
    """Apply an update to a float32 weight.

    LoRA: W + scale * B A (https://arxiv.org/abs/2106.09685). DoRA: each row i of that is scaled to the trained length m_i
    (https://arxiv.org/abs/2402.09353), divided by its length on this base.
    """
    if update is None:
        return weight
    if isinstance(update, Replace):
        return adapter.read(update.key)
    if isinstance(update, TokenRows):
        rows, indices = adapter.read(update.key), torch.tensor(update.indices)
        grown = weight.new_zeros((max(weight.shape[0], max(update.indices) + 1), *weight.shape[1:]))
        grown[: weight.shape[0]] = weight
        return grown.index_copy_(0, indices, rows)
    if update.transposed:
        return merge_tensor(adapter, replace(update, transposed=False), weight.T).T
    weight = weight + (adapter.read(update.b) @ adapter.read(update.a)) * update.scale
    if update.magnitude is None:
        return weight
    length = torch.linalg.norm(weight, dim=1)
    return (adapter.read(update.magnitude) / length).unsqueeze(1) * weight


def _expert_deltas(adapter: AdapterFile, update: ExpertLowRank) -> Iterator[torch.Tensor]:
    """Yield the delta of each expert; PEFT stores A by expert and rank, B by rank and expert."""
    a, b = adapter.read(update.a), adapter.read(update.b)
    a, b = a.reshape(update.num_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, update.num_experts)
    for expert in range(update.num_experts):
        delta = (b[:, :, expert] @ a[expert]) * update.scale
        yield delta.T if update.transposed else delta
