"""Dequantization kernels, bitwise equal to bitsandbytes on the CPU and to the reference."""

from itertools import product
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.functional import QuantState
from torch import Tensor

from qlora_train.kernels.ops.dequantize import by_triton
from tests.support import nf4_reference
from tests.support.triton_interpreter import DEVICE, needs_its_device

pytestmark = needs_its_device
SINGLE_OR_DOUBLE = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE_BLOCKS = [(64, 64, 64), (3, 4160, 64), (40, 256, 128), (9, 96, 32), (4, 2048, 1024), (300, 128, 64)]
"""(rows, columns, block size) with whole blocks per row: the only ones bitsandbytes dequantizes correctly on CPUs."""
PARTIAL_BLOCKS = [
    (1, 1, 64),
    (5, 7, 64),
    (7, 33, 32),
    (3, 50, 64),
    (40, 80, 64),
    (13, 96, 128),
    (2, 8192, 4096),
    (5, 3, 4096),
]


def stored(
    rows: int, columns: int, block_size: int, dtype: torch.dtype = torch.float32, *, quant_type: str = "nf4",
    double_quant: bool = True, storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:  # fmt: skip
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)).to(dtype) * 0.02
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant, quant_storage=storage
    )
    return packed, state


def actual(packed: Tensor, state: QuantState, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    moved = QuantState.from_dict(state.as_dict(packed=True), device=torch.device(DEVICE))
    return by_triton(packed.to(DEVICE), moved, dtype, out).cpu()


def by_reference(packed: Tensor, state: QuantState) -> Tensor:
    absmax = state.absmax
    if state.nested:
        absmax = nf4_reference.double_dequantize(
            nf4_reference.QuantizedAbsmax(state.absmax, state.state2.absmax, state.offset)
        )
    return nf4_reference.dequantize_4bit(
        packed.reshape(-1), absmax, tuple(state.shape), state.quant_type, block_size=state.blocksize, dtype=state.dtype
    )


def forms(shapes: list[tuple[int, int, int]]) -> Any:
    """Return every shape in the form of QLoRA, and one shape in every form."""
    usual = ("nf4", True, torch.bfloat16)
    others = [form for form in product(("nf4", "fp4"), (False, True), DTYPES) if form != usual]
    cases = [(*shape, *usual) for shape in shapes] + [(*shapes[2], *form) for form in others]
    return pytest.mark.parametrize(("rows", "columns", "block_size", "quant_type", "double_quant", "dtype"), cases)


@forms(WHOLE_BLOCKS)
def test_weights_match_bitsandbytes(
    rows: int, columns: int, block_size: int, quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    packed, state = stored(rows, columns, block_size, dtype, quant_type=quant_type, double_quant=double_quant)
    assert torch.equal(actual(packed, state, dtype), bnb.dequantize_4bit(packed, state))


@forms(PARTIAL_BLOCKS)
def test_weights_match_the_reference_if_rows_are_partial_blocks(
    rows: int, columns: int, block_size: int, quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    packed, state = stored(rows, columns, block_size, dtype, quant_type=quant_type, double_quant=double_quant)
    assert torch.equal(actual(packed, state, dtype), by_reference(packed, state))


@SINGLE_OR_DOUBLE
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_codes_in_a_wider_storage_dtype(storage: torch.dtype, double_quant: bool) -> None:
    packed, state = stored(24, 128, 64, torch.bfloat16, double_quant=double_quant, storage=storage)
    assert packed.dtype == storage
    assert torch.equal(actual(packed, state, torch.bfloat16), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("stored_as", DTYPES, ids=str)
@pytest.mark.parametrize("expected", DTYPES, ids=str)
def test_weights_are_rounded_to_the_dtype_of_the_state_first(stored_as: torch.dtype, expected: torch.dtype) -> None:
    packed, state = stored(24, 128, 64, stored_as)
    assert torch.equal(actual(packed, state, expected), bnb.dequantize_4bit(packed, state).to(expected))


@pytest.mark.parametrize("view", ["rows", "columns", "one of a stack"])
def test_out_may_be_a_view_of_a_larger_tensor(view: str) -> None:
    index = {
        "rows": (0, slice(8, 32), slice(0, 160)),
        "columns": (1, slice(0, 40), slice(64, 128)),
        "one of a stack": (2,),
    }[view]
    around = torch.full((3, 40, 160), 7.0, device=DEVICE)
    packed, state = stored(*around[index].shape, 32)
    actual(packed, state, torch.float32, out=around[index])
    assert torch.equal(around[index].cpu(), bnb.dequantize_4bit(packed, state))
    around[index] = 7.0
    assert (around == 7.0).all()


def test_out_with_strided_rows_is_refused() -> None:
    packed, state = stored(24, 64, 64)
    with pytest.raises(AssertionError, match="rows of the output are contiguous"):
        actual(packed, state, torch.float32, out=torch.zeros(64, 24, device=DEVICE).T)


def test_autograd_detects_the_write_to_out() -> None:
    packed, state = stored(24, 64, 64)
    factor, out = torch.ones(24, 64, device=DEVICE, requires_grad=True), torch.ones(24, 64, device=DEVICE)
    product = factor * out
    actual(packed, state, torch.float32, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        assert torch.equal(actual(packed, state, torch.float32, out=torch.ones_like(out)), out.cpu())


@SINGLE_OR_DOUBLE
def test_a_state_with_too_few_scales_is_refused(double_quant: bool) -> None:
    packed, state = stored(24, 64, 64, double_quant=double_quant)
    state.absmax = state.absmax[:-1]
    with pytest.raises(AssertionError, match="every block has a scale"):
        actual(packed, state, torch.float32)


def test_a_state_with_too_few_scales_of_scales_is_refused() -> None:
    packed, state = stored(257, 64, 64)
    state.state2.absmax = state.state2.absmax[:-1]
    with pytest.raises(AssertionError, match="every absmax has a scale"):
        actual(packed, state, torch.float32)
