"""Fused operations against the same formulas, differentiated by autograd in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_train.kernels.frozen_weight import FrozenWeight
from qlora_train.kernels.function_overrides import OVERRIDES, _match
from qlora_train.kernels.grouped_attention import grouped_attention
from qlora_train.kernels.lora_linear import LoraLayers, lora_linears
from qlora_train.kernels.ops import cross_entropy
from qlora_train.kernels.ops.gated import ACTIVATIONS, gated_linear
from qlora_train.kernels.ops.rotary import rotate

BATCH, SEQ = 2, 7


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_equal_with_gradients(one: Callable[..., Tensor], other: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare the outputs of two functions, and the gradients of all inputs under one random gradient of the output."""
    actual: list[list[Tensor]] = []
    grad: Tensor | None = None
    for function in (one, other):
        leaves = [each.detach().clone().requires_grad_() for each in inputs]
        output = function(*leaves)
        grad = torch.randn_like(output) if grad is None else grad
        actual.append([output, *torch.autograd.grad(output, leaves, grad)])
    for expected, got in zip(*actual, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def layer(features: int, out: int, scale: float, *, bias: bool) -> LoraLayers:
    linear = nn.Linear(features, out, bias=bias, dtype=torch.float64).requires_grad_(False)
    return LoraLayers([FrozenWeight(linear)], [numbers(3, features)], [numbers(out, 3)], [scale])


def reference(x: Tensor, layers: LoraLayers, a: Tensor, b: Tensor) -> Tensor:
    weight = layers.weights[0]
    return functional.linear(x, weight.read(), weight.bias) + layers.scales[0] * (x @ a.T) @ b.T


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_updates_below_one_ulp_are_preserved() -> None:
    linear = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    a, b, x = torch.randn(4, 64), torch.randn(64, 4), torch.randn(2048, 64).bfloat16()
    change = 2.0**-15 * x.float() @ a.T @ b.T
    base = x @ linear.weight.T
    assert float(change.abs().mean()) < 2.0**-9 * float(base.abs().mean())
    [output] = lora_linears(x, LoraLayers([FrozenWeight(linear)], [a], [b], [2.0**-15]))
    actual = output.float() - x.float() @ linear.weight.float().T
    assert float((actual * change).sum() / (change * change).sum()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_group_of_layers_with_one_input(bias: bool) -> None:
    one, two = layer(6, 10, 0.5, bias=bias), layer(6, 4, 2.0, bias=bias)

    def expected(x: Tensor, *factors: Tensor) -> Tensor:
        return torch.cat([reference(x, one, *factors[::2]), reference(x, two, *factors[1::2])], -1)

    def actual(x: Tensor, *factors: Tensor) -> Tensor:
        layers = LoraLayers([*one.weights, *two.weights], factors[:2], factors[2:], [0.5, 2.0])
        return torch.cat(lora_linears(x, layers), -1)

    assert_equal_with_gradients(expected, actual, numbers(BATCH, SEQ, 6), *one.a, *two.a, *one.b, *two.b)


def test_unused_output_has_no_gradient() -> None:
    one, two = layer(6, 10, 0.5, bias=False), layer(6, 4, 2.0, bias=False)
    factors = [tensor.requires_grad_() for tensor in (*one.a, *two.a, *one.b, *two.b)]
    layers = LoraLayers([*one.weights, *two.weights], factors[:2], factors[2:], [0.5, 2.0])
    lora_linears(numbers(BATCH, SEQ, 6), layers)[0].sum().backward()
    assert factors[1].grad is not None
    assert not factors[1].grad.any()
    assert factors[3].grad is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("in_one", [False, True])
def test_gated_layer(activation: str, in_one: bool) -> None:
    function = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }[activation]
    down = layer(6, 10, 0.5, bias=True)

    def parts(made: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = made.chunk(2, -1) if in_one else (made[..., :6] * 1, made[..., 6:] * 1)
        return gate, up

    def expected(made: Tensor, a: Tensor, b: Tensor) -> Tensor:
        gate, up = parts(made)
        return reference(function(gate) * up, down, a, b)

    def actual(made: Tensor, a: Tensor, b: Tensor) -> Tensor:
        layers = LoraLayers(down.weights, [a], [b], down.scales)
        return gated_linear(*parts(made), ACTIVATIONS[activation], layers)

    assert_equal_with_gradients(expected, actual, numbers(BATCH, SEQ, 12), down.a[0], down.b[0])


@pytest.mark.parametrize("one_row_of_angles", [False, True])
def test_rotary_embedding_rotates_pairs_of_features(one_row_of_angles: bool) -> None:
    features = 8
    angles = numbers(1 if one_row_of_angles else BATCH, 1, SEQ, features // 2)
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))

    def expected(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(torch.stack(x.transpose(1, 2).chunk(2, -1), -1)) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat([turned.real, turned.imag], -1)

    assert_equal_with_gradients(
        expected, lambda x: rotate(x.transpose(1, 2), cos, sin), numbers(BATCH, SEQ, 4, features)
    )


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_query_attention(key_heads: int, masked: bool) -> None:
    features, value_features = 8, 6
    mask = torch.zeros(BATCH, 1, SEQ, SEQ, dtype=torch.float64)
    mask.masked_fill_(torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1), -math.inf)
    mask[1, :, :, :2].masked_fill_(torch.ones(SEQ, 2, dtype=torch.bool).tril(-2), -1e9)

    def expected(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = (each.repeat_interleave(4 // key_heads, 1) for each in (key, value))
        attended = functional.scaled_dot_product_attention(query, keys, values, mask if masked else None, scale=0.3)
        return attended.transpose(1, 2)

    assert_equal_with_gradients(
        expected,
        lambda query, key, value: grouped_attention(query, key, value, mask if masked else None, 0.3),
        numbers(BATCH, 4, SEQ, features), numbers(BATCH, key_heads, SEQ, features),
        numbers(BATCH, key_heads, SEQ, value_features),
    )  # fmt: skip


@pytest.mark.parametrize(
    "own",
    [
        lambda q, k, cos, sin: q,  # one result
        lambda q, k, cos, sin: (q, k, cos),  # three
        lambda q, k, cos, sin: (q[..., :2], k),  # another shape
        lambda q, k, cos, sin: (q * cos[:, None], k * sin[:, None]),  # other values
        lambda q, k, cos, sin: (None, None),  # none to compare with
    ],
    ids=["one result", "three results", "another shape", "other values", "nothing"],
)
def test_function_that_computes_something_else_is_not_overridden(own: Callable[..., Any]) -> None:
    call = (numbers(1, 4, SEQ, 8), numbers(1, 2, SEQ, 8), numbers(1, SEQ, 8), numbers(1, SEQ, 8))
    assert not _match(own, OVERRIDES["apply_rotary_pos_emb"][1](own), call, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_cross_entropy_overwrites_the_logits_with_the_gradient(
    dtype: torch.dtype, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vocabulary = 9, 501
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 4 * vocabulary * rows_at_once)
    logits = (10 * torch.randn(rows, vocabulary)).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    targets[:2] = torch.tensor([0, vocabulary - 1])
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    actual = cross_entropy.losses_and_gradient_(logits, targets)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), exact.grad, rtol=max(rounding, 1e-5), atol=max(rounding, 1e-6))
