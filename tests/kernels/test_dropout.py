"""LoRA dropout in the fused kernels: rate, scale, memory, and gradients against autograd in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_train.kernels.frozen_weight import FrozenWeight
from qlora_train.kernels.lora_dropout import draw_mask, masked, masked_
from qlora_train.kernels.lora_linear import LoraLayers, lora_linears
from qlora_train.kernels.ops.gated import ACTIVATIONS, gated_linear
from qlora_train.kernels.tiled import checkpoint_tiled, compute_tiled

CPU = torch.device("cpu")
RATE, SCALE = 0.3, 0.5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mask_of(rows: int, features: int, rate: float) -> Tensor:
    mask = draw_mask(rows, features, rate, CPU)
    assert mask is not None
    return mask


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.1, 0.5, 0.99])
def test_share_of_zeros_is_the_rate(rate: float) -> None:
    rows, features = 2000, 501
    mask = mask_of(rows, features, rate)
    deviation = (rate * (1 - rate) / mask.numel()) ** 0.5
    assert set(mask.unique().tolist()) == {0, 1}
    assert 1 - float(mask.float().mean()) == pytest.approx(rate, abs=5 * deviation)
    if rate >= 0.05:  # rarer zeros are not normally distributed
        columns = 1 - mask.float().mean(0)
        assert float((columns - rate).abs().max()) < 6 * (rate * (1 - rate) / rows) ** 0.5


def test_neighbours_are_dropped_independently() -> None:
    mask = mask_of(2000, 512, 0.5).float() - 0.5
    for one, other in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1])):
        assert abs(float((one * other).mean())) < 5 * 0.25 / one.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_masked_values_are_unchanged_or_zero(dtype: torch.dtype) -> None:
    x, mask = torch.randn(7, 13).to(dtype), mask_of(7, 13, RATE)
    assert torch.equal(masked(x, mask), torch.where(mask.bool(), x, 0))
    changed = x.clone()
    assert masked_(changed, mask) is changed
    assert torch.equal(changed, masked(x, mask))


def layers_of(*outs: int) -> LoraLayers:
    linears = [nn.Linear(6, out, dtype=torch.float64).requires_grad_(False) for out in outs]
    a = [torch.randn(3, 6, dtype=torch.float64).requires_grad_() for _ in outs]
    b = [torch.randn(out, 3, dtype=torch.float64).requires_grad_() for out in outs]
    scales = [SCALE / (1 - RATE)] * len(outs)
    return LoraLayers([FrozenWeight(linear) for linear in linears], a, b, scales, RATE)


def reference(x: Tensor, mask: Tensor, layers: LoraLayers) -> Tensor:
    dropped = x * mask / (1 - RATE)
    outputs = [
        functional.linear(x, weight.read(), weight.bias) + SCALE * dropped @ a.T @ b.T
        for weight, a, b in zip(layers.weights, layers.a, layers.b, strict=True)
    ]
    return torch.cat(outputs, -1)


def compare(
    actual: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], x: Tensor, layers: LoraLayers
) -> None:
    shape = (*x.shape[:-1], sum(len(b) for b in layers.b))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = []
    for function in (actual, expected):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        pairs.append([y, *torch.autograd.grad(y, [leaf, *layers.a, *layers.b], grad)])
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("outs", [(10,), (10, 4, 4)])
def test_forward_and_gradients_with_the_same_mask(outs: tuple[int, ...]) -> None:
    layers, x = layers_of(*outs), torch.randn(2, 7, 6, dtype=torch.float64)
    state = torch.get_rng_state()
    mask = mask_of(14, 6, RATE).view(x.shape)
    torch.set_rng_state(state)
    compare(lambda x: torch.cat(lora_linears(x, layers), -1), lambda x: reference(x, mask, layers), x, layers)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_layer_with_the_same_mask(name: str) -> None:
    layers, x = layers_of(10), torch.randn(2, 7, 12, dtype=torch.float64)
    state = torch.get_rng_state()
    mask = mask_of(14, 6, RATE).view(2, 7, 6)
    torch.set_rng_state(state)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., :6] * 1, x[..., 6:] * 1

    def expected(x: Tensor) -> Tensor:
        gate, up = parts(x)
        return reference(ACTIVATIONS[name].forward(gate) * up, mask, layers)

    compare(lambda x: gated_linear(*parts(x), ACTIVATIONS[name], layers), expected, x, layers)


@pytest.mark.parametrize("tile_rows", [1, 5, 100])
def test_recomputed_tiles_draw_the_same_masks(tile_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_train.kernels.tiled.TILE_ROWS", tile_rows)
    layers, x = layers_of(10), torch.randn(14, 6, dtype=torch.float64)
    actual, after = [], []
    for way in (compute_tiled, lambda function, x: checkpoint_tiled(function, x, [*layers.a, *layers.b])):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = way(lambda x: lora_linears(x, layers)[0], leaf)
        drawn = torch.get_rng_state()
        actual.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layers.a, *layers.b])])
        assert torch.equal(drawn, torch.get_rng_state()), "a backward pass restores the generator"
        after.append(drawn)
    assert torch.equal(*after)
    for one, other in zip(*actual, strict=True):
        assert torch.equal(one, other)


def test_one_byte_per_value_is_saved() -> None:
    layers, x = layers_of(10, 4), torch.randn(64, 6, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linears(x, layers)
    masks = [tensor for tensor in saved if tensor.dtype == torch.uint8]
    assert [mask.untyped_storage().nbytes() for mask in masks] == [x.numel()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_masks_are_seeded_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_train.kernels.tiled.TILE_ROWS", 300)
    gpu = torch.device("cuda", 0)
    state = torch.get_rng_state()
    mask = draw_mask(2000, 512, RATE, gpu)
    assert mask is not None
    assert float(mask.float().mean()) == pytest.approx(1 - RATE, abs=3e-3)
    torch.set_rng_state(state)
    assert torch.equal(mask, draw_mask(2000, 512, RATE, gpu))
    linear = nn.Linear(512, 64, device=gpu).requires_grad_(False)
    a, b = (torch.randn(shape, device=gpu, requires_grad=True) for shape in ((8, 512), (64, 8)))
    layers, x = LoraLayers([FrozenWeight(linear)], [a], [b], [1.0], RATE), torch.randn(1000, 512, device=gpu)
    actual = []
    for way in (compute_tiled, lambda function, x: checkpoint_tiled(function, x, [a, b])):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = way(lambda x: lora_linears(x, layers)[0], leaf)
        actual.append([y, *torch.autograd.grad(y.square().sum(), [leaf, a, b])])
    for one, other in zip(*actual, strict=True):
        torch.testing.assert_close(one, other)
