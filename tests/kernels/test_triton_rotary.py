"""Rotary embedding kernels against the reference and against complex numbers in float64."""

import pytest
import torch
from torch import Tensor

from qlora_train.kernels.ops import rotary as reference
from qlora_train.kernels.ops.rotary import rotate
from tests.support.triton_interpreter import CLOSE, DEVICE, needs_its_device, use_kernels

pytestmark = needs_its_device
SHAPES = pytest.mark.parametrize("shape", [(2, 3, 7, 8), (1, 1, 1, 2), (2, 40, 3, 128), (3, 5, 4, 12)], ids=str)
"""(batch, heads, seq, features)."""
ONE_ROW = pytest.mark.parametrize("one_row_of_angles", [False, True])


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def cos_and_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.cat([part, part], -1).to(dtype) for part in (angles.cos(), angles.sin()))
    return cos, sin


@SHAPES
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(("one_row_of_angles", "positions_first"), [(False, False), (True, True)])
def test_both_passes_match_the_reference(
    shape: tuple[int, int, int, int], one_row_of_angles: bool, dtype: torch.dtype, positions_first: bool
) -> None:
    from qlora_train.kernels.ops import rotary_triton as kernels

    batch, heads, seq, features = shape
    x = numbers(*shape, dtype=dtype)
    if positions_first:
        x = numbers(batch, seq, heads, features, dtype=dtype).transpose(1, 2)
    # unlike in a rotation the halves differ, so that mixing them up fails
    cos, sin = (numbers(1 if one_row_of_angles else batch, 1, seq, features, seed=seed, dtype=dtype) for seed in (1, 2))
    for ours, theirs in zip(
        (kernels.forward, kernels.backward), (reference.REFERENCE.forward, reference.REFERENCE.backward), strict=True
    ):
        actual, expected = ours(x, cos, sin), theirs(x, cos, sin)
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected, **CLOSE[dtype])


@SHAPES
@ONE_ROW
def test_rotation_and_gradients_match_complex_numbers(
    shape: tuple[int, int, int, int], one_row_of_angles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch)
    batch, _, seq, features = shape
    angles = numbers(1 if one_row_of_angles else batch, 1, seq, features // 2, seed=1).double()
    x, grad = numbers(*shape), numbers(*shape, seed=2)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    actual = rotate(leaf, *cos_and_sin(angles, torch.float32))
    turned = torch.view_as_complex(torch.stack(exact.chunk(2, -1), -1)) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    actual.backward(grad)
    expected.backward(grad.double())
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_angles_in_float32_rotate_values_of_any_dtype() -> None:
    from qlora_train.kernels.ops import rotary_triton as kernels

    x, angles = numbers(2, 3, 7, 8, dtype=torch.bfloat16), numbers(1, 1, 7, 4, seed=1)
    arguments = (x, *cos_and_sin(angles, torch.float32))
    torch.testing.assert_close(
        kernels.forward(*arguments), reference.REFERENCE.forward(*arguments), **CLOSE[torch.bfloat16]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_are_rounded_where_the_reference_rounds(dtype: torch.dtype) -> None:
    from qlora_train.kernels.ops import rotary_triton as kernels

    shapes = (2, 3, 40, 32), (2, 1, 40, 32), (2, 1, 40, 32)
    x, cos, sin = (numbers(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    assert (kernels.forward(x, cos, sin) == reference.REFERENCE.forward(x, cos, sin)).float().mean() > 0.98
    assert (kernels.backward(x, cos, sin) == reference.REFERENCE.backward(x, cos, sin)).float().mean() > 0.98


def test_strides_beyond_32_bits() -> None:
    from qlora_train.kernels.ops import rotary_triton as kernels

    storage = torch.empty(2**31 + 8, dtype=torch.float16, device=DEVICE)  # only three rows are touched
    x = storage.as_strided((1, 3, 1, 8), (0, 2**30, 8, 1))
    x.copy_(numbers(1, 3, 1, 8, dtype=x.dtype))
    cos, sin = numbers(1, 1, 1, 8, seed=1, dtype=x.dtype), numbers(1, 1, 1, 8, seed=2, dtype=x.dtype)
    actual, expected = kernels.forward(x, cos, sin), reference.REFERENCE.forward(x.contiguous(), cos, sin)
    torch.testing.assert_close(actual, expected, **CLOSE[x.dtype])


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 7, 4), (2, 1, 7, 16), (1, 1, 3, 8), (3, 1, 7, 8), (2, 3, 7, 8), (7, 1, 8), (3, 1, 2, 7, 8)],
    ids=str,
)
def test_angles_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    from qlora_train.kernels.ops import rotary_triton as kernels

    x, right, other = numbers(2, 3, 7, 8), numbers(2, 1, 7, 8), numbers(*shape)
    for cos, sin in ((other, right), (right, other)):
        for compute in (kernels.forward, kernels.backward):
            with pytest.raises(ValueError, match=r"not \(batch or 1, 1, seq, features\)"):
                compute(x, cos, sin)
