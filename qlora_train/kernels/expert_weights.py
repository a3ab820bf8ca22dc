"""Stacked expert weights in 4 bits: one 3-D parameter, each expert quantized on its own.

Transformers stores the experts of a layer as one parameter (experts, a, b), which bitsandbytes' linear layers do not
support. Here the parameter is the packed codes, parametrized by the scales: reading it dequantizes the whole stack, and
`expert_reader` dequantizes one expert. Codes and scales are bitwise those of bitsandbytes for a linear layer: blocks of 64,
double quantization in blocks of 256.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlora_train.kernels.block_sizes import ABSMAX_BLOCK_SIZE, BLOCK_SIZE
from qlora_train.kernels.fsdp_units import is_sharded_tensor
from qlora_train.kernels.ops.dequantize import dequantize


@dataclass(frozen=True)
class ExpertLora:
    """LoRA of stacked experts, W_e + scale * b_e a_e: `a` (experts, r, in), `b` (experts, out, r).

    A `transposed` stack holds (in, out) matrices.
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False

    def add_to(self, stack: Tensor) -> Tensor:
        """Return the updated stack, (experts, out, in) or, transposed, (experts, in, out)."""
        update = (self.b @ self.a) * self.scale
        return stack + (update.mT if self.transposed else update).to(stack.dtype)


@dataclass(frozen=True)
class QuantizedStack:
    """`codes` (experts, bytes of one expert) uint8, and the quantization state of each expert."""

    codes: Tensor
    states: tuple[QuantState, ...]


def quantize_stack(matrices: Iterable[Tensor], *, quant_type: str, double_quant: bool) -> QuantizedStack:
    """Quantize the matrices (a, b) of a stack, one at a time."""
    codes, states = [], []
    for matrix in matrices:
        packed, state = quantize_4bit(
            matrix.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type=quant_type
        )
        codes.append(packed.reshape(-1))
        states.append(state)
    return QuantizedStack(torch.stack(codes), tuple(states))


class ExpertWeights(nn.Module):
    """The scales of a quantized stack; as a parametrization, `forward(codes)` is the dequantized stack.

    Attributes:
        shape: (experts, a, b) of the stack.
        dtype: of the dequantized weights.
        lora: added to the stack by `forward`; None: the base weights.
    """

    def __init__(self, states: tuple[QuantState, ...]) -> None:
        super().__init__()
        self.lora: ExpertLora | None = None
        first = states[0]
        self.shape = torch.Size((len(states), *first.shape))
        self.dtype: torch.dtype = first.dtype
        self.quant_type: str = first.quant_type
        self.nested: bool = first.nested
        self.absmax: Tensor = nn.Buffer(torch.stack([state.absmax for state in states]), persistent=False)
        self.code = nn.Buffer(first.code, persistent=False)
        if first.nested:
            self.offsets = nn.Buffer(torch.stack([state.offset for state in states]), persistent=False)
            scales = torch.stack([state.state2.absmax for state in states])
            self.absmax_scales = nn.Buffer(scales, persistent=False)
            self.absmax_code = nn.Buffer(first.state2.code, persistent=False)

    @property
    def has_block_rows(self) -> bool:
        """Whether absmax is a parameter with one row per block, which FSDP can shard."""
        return isinstance(self.absmax, nn.Parameter)

    def set_absmax_blocks(self, absmax: nn.Parameter) -> None:
        """Replace the absmax by the same bytes, uint8 (blocks of the stack, bytes of an absmax)."""
        del self.absmax
        self.absmax = absmax

    def forward(self, codes: Tensor) -> Tensor:
        """Return the dequantized stack, (experts, a, b), with LoRA if set."""
        if is_sharded_tensor(codes):  # PEFT asks for the shape of a sharded stack; values would be NaN
            return torch.full((), torch.nan, dtype=self.dtype, device=codes.device).expand(self.shape)
        stack = torch.empty(self.shape, dtype=self.dtype, device=codes.device)
        for index, out in enumerate(stack):
            self.matrix(codes, index, out=out)
        return stack if self.lora is None else self.lora.add_to(stack)

    @torch.no_grad()
    def matrix(self, codes: Tensor, index: int, *, out: Tensor | None = None) -> Tensor:
        """Return the dequantized weights of one expert, (a, b), without LoRA."""
        return dequantize(codes.view(self.shape[0], -1, 1)[index], self._state(index), self.dtype, out=out)

    def _state(self, index: int) -> QuantState:
        nested = {}
        if self.nested:
            second = QuantState(
                absmax=self.absmax_scales[index],
                code=self.absmax_code,
                blocksize=ABSMAX_BLOCK_SIZE,
                dtype=torch.float32,
            )
            nested = {"offset": self.offsets[index], "state2": second}
        absmax = self.absmax if self.nested or not self.has_block_rows else self.absmax.view(torch.float32)
        return QuantState(
            absmax=absmax.view(self.shape[0], -1)[index],
            shape=self.shape[1:],
            dtype=self.dtype,
            blocksize=BLOCK_SIZE,
            code=self.code,
            quant_type=self.quant_type,
            **nested,
        )

    @property
    def scale_tensors(self) -> tuple[Tensor, ...]:
        """Block scales of all experts, both levels, and their offsets."""
        return (self.absmax, self.offsets, self.absmax_scales) if self.nested else (self.absmax,)

    @property
    def table_tensors(self) -> tuple[Tensor, ...]:
        """Code tables, shared by all experts."""
        return (self.code, self.absmax_code) if self.nested else (self.code,)


def parametrize_experts(module: nn.Module, name: str, weights: ExpertWeights) -> None:
    """Parametrize `module.<name>`, which holds packed codes, to read as the dequantized stack."""
    # unsafe: the parametrization changes shape and dtype on purpose, and has no right inverse
    parametrize.register_parametrization(module, name, weights, unsafe=True)


def quantized_experts(module: nn.Module, name: str) -> tuple[Tensor, ExpertWeights] | None:
    """Return the packed codes and the scales of `module.<name>`; None if it is not in 4 bits."""
    if not parametrize.is_parametrized(module, name):
        return None
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    weights = next((part for part in chain if isinstance(part, ExpertWeights)), None)
    return None if weights is None else (chain.original, weights)


def expert_reader(module: nn.Module, name: str) -> Callable[[int], Tensor]:
    """Return index -> weights (a, b) of one expert of `module.<name>`, in 4 bits or not."""
    quantized = quantized_experts(module, name)
    if quantized is not None:
        codes, weights = quantized
        return lambda index: weights.matrix(codes, index)
    stack: Tensor = getattr(module, name)
    return lambda index: stack[index]
