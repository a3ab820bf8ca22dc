"""How large the state of an optimizer and a checkpoint are, counted from the shapes of what trains."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

Shape = Sequence[int]

FLOAT_BYTES = 4
BLOCK_SIZE = 256
"""Numbers that share a scale in bitsandbytes' 8-bit state."""
MIN_QUANTIZED_NUMEL = 4096
"""bitsandbytes keeps the state of smaller tensors in float32."""
CODE_TABLE_BYTES = 256 * FLOAT_BYTES
"""The values that 8-bit codes stand for, which the state of every tensor names."""


def optimizer_state_bytes(optim: str, shapes: Iterable[Shape]) -> int:
    """Return the bytes of an optimizer's state.

    Args:
        optim: its name for Transformers, as `train.optim` has it but for `auto`.
        shapes: of what trains.
    """
    of_tensor = _STATES[optim.removeprefix("paged_")]
    return sum(of_tensor(shape) for shape in shapes)


def _moments_in_32_bits(shape: Shape) -> int:
    return 2 * FLOAT_BYTES * math.prod(shape) + FLOAT_BYTES


def _moment_in_8_bits(shape: Shape) -> int:
    numel = math.prod(shape)
    if numel < MIN_QUANTIZED_NUMEL:
        return FLOAT_BYTES * numel
    return numel + FLOAT_BYTES * math.ceil(numel / BLOCK_SIZE) + CODE_TABLE_BYTES


def _factored(shape: Shape) -> int:
    """Adafactor's second moment: of a matrix the sums of its rows and columns."""
    if len(shape) < 2:
        return FLOAT_BYTES * math.prod(shape)
    *leading, rows, columns = shape
    return FLOAT_BYTES * math.prod(leading) * (rows + columns)


_STATES: Mapping[str, Callable[[Shape], int]] = {
    "adamw_torch": _moments_in_32_bits,
    "adamw_torch_fused": _moments_in_32_bits,
    "adamw_32bit": _moments_in_32_bits,
    "adamw_8bit": lambda shape: 2 * _moment_in_8_bits(shape),
    "lion_8bit": _moment_in_8_bits,
    "adafactor": _factored,
    "sgd": lambda _shape: 0,
}
