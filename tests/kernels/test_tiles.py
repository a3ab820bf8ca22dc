"""Tiled computation matches the whole, and is bitwise equal with and without recomputation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_train.kernels import tiled
from qlora_train.kernels.tiled import checkpoint_tiled, compute_tiled

ROWS, WIDTH = 23, 12


@pytest.fixture(autouse=True, params=[1, 5, 23, 64])
def tile_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE_ROWS", request.param)


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def weights_of(dtype: torch.dtype) -> list[Tensor]:
    return [numbers(*shape, dtype=dtype).requires_grad_() for shape in ((WIDTH, 30), (WIDTH, 30), (30, 4), (3, 3))]


def mlp(weights: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a gated MLP; the last weight is unused."""
    return lambda x: (torch.sigmoid(x @ weights[0]) * (x @ weights[1])) @ weights[2]


def gradients(way: Callable[..., Tensor], *, passes: int = 1, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Return outputs and gradients after some passes on the same weights."""
    weights, x = weights_of(dtype), numbers(1, ROWS, WIDTH, dtype=dtype).requires_grad_()
    for _ in range(passes):
        y = way(mlp(weights), x, weights)
        (y * numbers(*y.shape, dtype=dtype)).sum().backward()
    return [y.detach(), x.grad, *(weight.grad for weight in weights)]


def whole(function: Any, x: Tensor, _weights: Any) -> Tensor:
    actual: Tensor = function(x)
    return actual


def saved(function: Any, x: Tensor, _weights: Any) -> Tensor:
    return compute_tiled(function, x)


def test_tiles_match_the_whole() -> None:
    *actual, unused = gradients(checkpoint_tiled)
    *expected, _ = gradients(whole)
    assert unused is None
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_is_bitwise_equal(dtype: torch.dtype) -> None:
    actual, expected = (gradients(way, passes=3, dtype=dtype) for way in (checkpoint_tiled, saved))
    for one, other in zip(actual[:-1], expected[:-1], strict=True):
        assert torch.equal(one, other)


def test_input_without_a_gradient() -> None:
    weights, x = weights_of(torch.float64), numbers(ROWS, WIDTH)
    checkpoint_tiled(mlp(weights), x, weights).sum().backward()
    actual = [weight.grad for weight in weights[:3]]
    expected = torch.autograd.grad(mlp(weights)(x).sum(), weights[:3])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_backward_pass_recomputes_under_the_autocast_of_the_forward_pass() -> None:
    seen = []
    weights = weights_of(torch.float32)

    def function(x: Tensor) -> Tensor:
        seen.append((x @ weights[0]).dtype)
        return mlp(weights)(x)

    x = numbers(ROWS, WIDTH, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = checkpoint_tiled(function, x, weights)
    y.float().sum().backward()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) % 2 == 0


def test_only_the_input_is_saved() -> None:
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    weights, x = weights_of(torch.float32), numbers(ROWS, WIDTH, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        checkpoint_tiled(mlp(weights), x, weights)
    assert {tensor.untyped_storage().data_ptr() for tensor in held} == {x.untyped_storage().data_ptr()}
