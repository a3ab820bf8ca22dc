"""A function of rows in tiles: what the whole computes, in the same bits whether it is computed again or not."""

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
    """Return a gated MLP; the last of its weights is not used."""
    return lambda x: (torch.sigmoid(x @ weights[0]) * (x @ weights[1])) @ weights[2]


def gradients(way: Callable[..., Tensor], *, passes: int = 1, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Return what a way computes and the gradients it makes, after some passes on the same weights."""
    weights, x = weights_of(dtype), numbers(1, ROWS, WIDTH, dtype=dtype).requires_grad_()
    for _ in range(passes):
        y = way(mlp(weights), x, weights)
        (y * numbers(*y.shape, dtype=dtype)).sum().backward()
    return [y.detach(), x.grad, *(weight.grad for weight in weights)]


def whole(function: Any, x: Tensor, _weights: Any) -> Tensor:
    found: Tensor = function(x)
    return found


def kept(function: Any, x: Tensor, _weights: Any) -> Tensor:
    return compute_tiled(function, x)


def test_tiles_compute_what_the_whole_does() -> None:
    *found, unused = gradients(checkpoint_tiled)
    *wanted, _ = gradients(whole)
    assert unused is None
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_the_same_whether_it_is_computed_again_or_not(dtype: torch.dtype) -> None:
    found, wanted = (gradients(way, passes=3, dtype=dtype) for way in (checkpoint_tiled, kept))
    for one, other in zip(found[:-1], wanted[:-1], strict=True):
        assert torch.equal(one, other)


def test_an_input_without_a_gradient_is_computed_with() -> None:
    weights, x = weights_of(torch.float64), numbers(ROWS, WIDTH)
    checkpoint_tiled(mlp(weights), x, weights).sum().backward()
    found = [weight.grad for weight in weights[:3]]
    wanted = torch.autograd.grad(mlp(weights)(x).sum(), weights[:3])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_is_in_the_backward_pass_as_it_was_in_the_forward_pass() -> None:
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


def test_nothing_but_the_input_is_kept() -> None:
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    weights, x = weights_of(torch.float32), numbers(ROWS, WIDTH, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        checkpoint_tiled(mlp(weights), x, weights)
    assert {tensor.untyped_storage().data_ptr() for tensor in held} == {x.untyped_storage().data_ptr()}
