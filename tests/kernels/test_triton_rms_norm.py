"""RMS norm kernels against the reference and against autograd in float64."""

import pytest
import torch
from torch import Tensor

from qlora_train.kernels.ops import rms_norm as reference
from qlora_train.kernels.ops.rms_norm import Variant, rms_norm
from tests.support.triton_interpreter import CLOSE, DEVICE, needs_its_device, use_kernels

pytestmark = needs_its_device
EPS = 1e-5
VARIANTS = pytest.mark.parametrize(
    "variant", [Variant(offset, rounds_first) for offset in (0.0, 1.0) for rounds_first in (True, False)], ids=str
)
SHAPES = pytest.mark.parametrize("shape", [(3, 1, 5, 96), (1, 1), (40, 130), (2, 5000)], ids=str)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@SHAPES
@VARIANTS
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_both_passes_match_the_reference(shape: tuple[int, ...], variant: Variant, dtype: torch.dtype) -> None:
    from qlora_train.kernels.ops import rms_norm_triton as kernels

    x, weight, grad = numbers(*shape, dtype=dtype), numbers(shape[-1], seed=1, dtype=dtype), numbers(*shape, seed=2)
    expected, wanted_scale = reference.REFERENCE.forward(x, weight, EPS, variant)
    actual, scale = kernels.forward(x, weight, EPS, variant)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual, expected, **CLOSE[dtype])

    arguments = (grad.to(dtype), x, weight, scale, variant)
    torch.testing.assert_close(kernels.backward(*arguments), reference.REFERENCE.backward(*arguments), **CLOSE[dtype])


@VARIANTS
def test_gradients_match_autograd_in_float64(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch)
    x, weight, grad = numbers(6, 70), numbers(70, seed=1), numbers(6, 70, seed=2)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    actual = rms_norm(leaf, weight, EPS, variant)
    expected = exact / (exact.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (weight.double() + variant.offset)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    actual.backward(grad)
    expected.backward(grad.double())
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


@VARIANTS
def test_float32_weight_gives_the_dtype_of_the_reference(variant: Variant) -> None:
    from qlora_train.kernels.ops import rms_norm_triton as kernels

    x, weight = numbers(6, 70, dtype=torch.bfloat16), numbers(70, seed=1)
    expected, scale = reference.REFERENCE.forward(x, weight, EPS, variant)
    actual, _ = kernels.forward(x, weight, EPS, variant)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, **CLOSE[actual.dtype])
    arguments = (numbers(6, 70, seed=2, dtype=actual.dtype), x, weight, scale, variant)
    torch.testing.assert_close(
        kernels.backward(*arguments), reference.REFERENCE.backward(*arguments), **CLOSE[torch.bfloat16]
    )


@pytest.mark.parametrize("layout", ["a part of wider rows", "heads before positions", "features apart"])
def test_inputs_of_any_strides(layout: str) -> None:
    from qlora_train.kernels.ops import rms_norm_triton as kernels

    part = {
        "a part of wider rows": lambda each: each[..., :64],
        "heads before positions": lambda each: each.view(4, 5, 3, 64).transpose(1, 2),
        "features apart": lambda each: each.view(4, 5, 64, 3).transpose(2, 3),
    }[layout]
    made, grads = (part(numbers(4, 5, 192, seed=seed)) for seed in (0, 2))
    weight, variant = numbers(64, seed=1), Variant(0.0, False)
    expected, scale = reference.REFERENCE.forward(made, weight, EPS, variant)
    torch.testing.assert_close(kernels.forward(made, weight, EPS, variant)[0], expected)
    arguments = (grads, made, weight, scale, variant)
    torch.testing.assert_close(kernels.backward(*arguments), reference.REFERENCE.backward(*arguments))
