"""Gated product kernels against the reference, and with their linear layer against autograd in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_train.kernels.frozen_weight import FrozenWeight
from qlora_train.kernels.lora_linear import LoraLayers
from qlora_train.kernels.ops import gated as reference
from qlora_train.kernels.ops.gated import ACTIVATIONS, gated_linear
from tests.support.triton_interpreter import CLOSE, DEVICE, needs_its_device, use_kernels

pytestmark = needs_its_device
NAMES = pytest.mark.parametrize("name", ACTIVATIONS)
RTOL = {dtype: 2 * close["rtol"] for dtype, close in CLOSE.items()}
"""f(gate) and then the product may differ by one ulp each."""
ATOL = 1e-5
"""Below -4, 1 + erf(x) and 1 + tanh(x) cancel: one ulp of 1, times x up."""
FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2).to(DEVICE, dtype)


def both_passes(gate: Tensor, up: Tensor, grad: Tensor, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return product, grad_gate and grad_up of the kernels and of the reference."""
    from qlora_train.kernels.ops import gated_triton as kernels

    product, gradients = reference.REFERENCE.recompute(gate, up, ACTIVATIONS[name])
    actual = [kernels.forward(gate, up, name), *kernels.backward(grad, gate, up, name)]
    return actual, [product, *gradients(grad.clone())]


@NAMES
@pytest.mark.parametrize("shape", [(1, 1), (3, 1030), (5, 4, 130)], ids=str)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_both_passes_match_the_reference(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    gate, up, grad = (numbers(*shape, seed=seed, dtype=dtype) for seed in range(3))
    for actual, expected in zip(*both_passes(gate, up, grad, name), strict=True):
        torch.testing.assert_close(actual, expected, rtol=RTOL[dtype], atol=ATOL)


@NAMES
def test_activations_far_from_zero(name: str) -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, -20.0, -5.0, -1e-6, 0.0, 1e-6, 5.0, 20.0, 90.0, 1e4], device=DEVICE)
    up, grad = torch.full_like(gate, 3.0), torch.full_like(gate, 0.5)
    for actual, expected in zip(*both_passes(gate, up, grad, name), strict=True):
        torch.testing.assert_close(actual, expected, rtol=RTOL[torch.float32], atol=ATOL)


@NAMES
def test_gate_and_up_may_be_halves_of_one_tensor(name: str) -> None:
    gate, up = numbers(3, 4, 140).chunk(2, -1)
    for actual, expected in zip(*both_passes(gate, up, numbers(3, 4, 70, seed=1), name), strict=True):
        torch.testing.assert_close(actual, expected, rtol=RTOL[torch.float32], atol=ATOL)


@NAMES
def test_gradients_of_the_layer_match_autograd_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch)
    linear = nn.Linear(6, 10, device=DEVICE).requires_grad_(False)
    leaves = [
        each.requires_grad_() for each in (*(numbers(2, 7, 6, seed=s) for s in (0, 1)), numbers(3, 6), numbers(10, 3))
    ]
    exact = [each.detach().double().requires_grad_() for each in leaves]

    gate, up, a, b = leaves
    actual = gated_linear(gate, up, ACTIVATIONS[name], LoraLayers([FrozenWeight(linear)], [a], [b], [0.5]))
    gate, up, a, b = exact
    product = FUNCTIONS[name](gate) * up
    expected = functional.linear(product, linear.weight.double(), linear.bias.double()) + 0.5 * (product @ a.T) @ b.T
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)
    grad = numbers(2, 7, 10, seed=3)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


@NAMES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_are_rounded_where_the_reference_rounds(name: str, dtype: torch.dtype) -> None:
    gate, up, grad = (numbers(4, 1000, seed=seed, dtype=dtype) for seed in range(3))
    for actual, expected in zip(*both_passes(gate, up, grad, name), strict=True):
        assert (actual == expected).float().mean() > 0.95
