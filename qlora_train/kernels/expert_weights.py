"""A stack of expert matrices in 4 bits: one 3-D parameter, each expert quantised on its own.

Transformers keeps the experts of a layer as one parameter of shape (experts, a, b), which bitsandbytes' linear layers
cannot hold. Here the parameter becomes the packed codes, and this module, registered as its parametrisation, the scales:
whoever reads the parameter gets the dequantised stack, and whoever needs one expert asks for that one alone. The numbers
are those of bitsandbytes for the matrix of a linear layer (blocks of 64, double quantisation in blocks of 256), so that an
expert has the very weights it would have as a layer of its own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlora_train.kernels.ops.dequantize import dequantize

BLOCK_SIZE = 64
ABSMAX_BLOCK_SIZE = 256


@dataclass(frozen=True)
class LowRankStack:
    """A low-rank change of a stack, W_e + scale * b_e a_e: `a` (experts, r, in), `b` (experts, out, r).

    `transposed` stacks hold (in, out) matrices, and change by the transpose.
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False

    def add_to(self, stack: Tensor) -> Tensor:
        """Return the changed stack, (experts, out, in) or, when transposed, (experts, in, out)."""
        change = (self.b @ self.a) * self.scale
        return stack + (change.mT if self.transposed else change).to(stack.dtype)


@dataclass(frozen=True)
class QuantizedStack:
    """What `quantize_stack` makes: `codes` (experts, bytes of one expert) uint8, and the state of each expert."""

    codes: Tensor
    states: tuple[QuantState, ...]


def quantize_stack(matrices: Iterable[Tensor], *, quant_type: str, double_quant: bool) -> QuantizedStack:
    """Quantise the matrices (a, b) of a stack of experts, each on its own and one at a time."""
    codes, states = [], []
    for matrix in matrices:
        packed, state = quantize_4bit(
            matrix.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type=quant_type
        )
        codes.append(packed.reshape(-1))
        states.append(state)
    return QuantizedStack(torch.stack(codes), tuple(states))


class ExpertWeights(nn.Module):
    """The scales of a quantised stack; as a parametrisation, `forward(codes)` is the dequantised stack.

    Attributes:
        shape: (experts, a, b) of the stack.
        dtype: of the dequantised weights.
        change: added to the stack that `forward` makes, while it is set.
    """

    def __init__(self, states: tuple[QuantState, ...]) -> None:
        super().__init__()
        self.change: LowRankStack | None = None
        first = states[0]
        self.shape = torch.Size((len(states), *first.shape))
        self.dtype: torch.dtype = first.dtype
        self.quant_type: str = first.quant_type
        self.nested: bool = first.nested
        self.absmax = nn.Buffer(torch.stack([state.absmax for state in states]), persistent=False)
        self.code = nn.Buffer(first.code, persistent=False)
        if first.nested:
            self.offsets = nn.Buffer(torch.stack([state.offset for state in states]), persistent=False)
            scales = torch.stack([state.state2.absmax for state in states])
            self.absmax_scales = nn.Buffer(scales, persistent=False)
            self.absmax_code = nn.Buffer(first.state2.code, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the dequantised stack, (experts, a, b), with the change that is set."""
        stack = torch.empty(self.shape, dtype=self.dtype, device=codes.device)
        for index, place in enumerate(stack):
            self.matrix(codes, index, out=place)
        return stack if self.change is None else self.change.add_to(stack)

    @torch.no_grad()
    def matrix(self, codes: Tensor, index: int, *, out: Tensor | None = None) -> Tensor:
        """Return the dequantised weights of one expert, (a, b), written into `out` where it is given."""
        return dequantize(codes[index].unsqueeze(1), self._state(index), self.dtype, out=out)

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
        return QuantState(
            absmax=self.absmax[index],
            shape=self.shape[1:],
            dtype=self.dtype,
            blocksize=BLOCK_SIZE,
            code=self.code,
            quant_type=self.quant_type,
            **nested,
        )

    @property
    def scale_tensors(self) -> tuple[Tensor, ...]:
        """The block scales of all experts, both levels, with their offsets."""
        return (self.absmax, self.offsets, self.absmax_scales) if self.nested else (self.absmax,)

    @property
    def table_tensors(self) -> tuple[Tensor, ...]:
        """The code tables, which all experts share."""
        return (self.code, self.absmax_code) if self.nested else (self.code,)


def parametrize_experts(module: nn.Module, name: str, states: tuple[QuantState, ...]) -> None:
    """Make `module.<name>`, which holds packed codes, read as the stack that they stand for."""
    # unsafe: the parametrisation changes shape and dtype on purpose, and nothing is assigned through it
    parametrize.register_parametrization(module, name, ExpertWeights(states), unsafe=True)


def quantized_experts(module: nn.Module, name: str) -> tuple[Tensor, ExpertWeights] | None:
    """Return the packed codes and the scales of `module.<name>`; None where it is not in 4 bits."""
    if not parametrize.is_parametrized(module, name):
        return None
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    weights = next((part for part in chain if isinstance(part, ExpertWeights)), None)
    return None if weights is None else (chain.original, weights)


def expert_reader(module: nn.Module, name: str) -> Callable[[int], Tensor]:
    """Return the function that gives the weights of one expert, (a, b), whether they are in 4 bits or not."""
    found = quantized_experts(module, name)
    if found is not None:
        codes, weights = found
        return lambda index: weights.matrix(codes, index)
    stack: Tensor = getattr(module, name)
    return lambda index: stack[index]
