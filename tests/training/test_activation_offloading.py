"""Offloaded activations: the same bits, at most two tensors on the device, reused host memory, errors for wrong use.

On a CPU copies are synchronous; everything else happens in the same order as on a GPU.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_train.kernels.checkpointing_levels import CheckpointingLevel
from qlora_train.kernels.install import install
from qlora_train.objectives.label_losses import label_losses
from qlora_train.training.memory import activation_offloading
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing
from qlora_train.training.memory.activation_offloading import ActivationOffloading, Slabs
from qlora_train.utils.errors import TrainingError, is_out_of_memory
from tests.support.fake_cuda import IS_FAKE
from tests.support.runs import adapted_model

Pico = Callable[..., Path]
IDS = torch.arange(60).reshape(3, 20) * 5 % 300 + 4
BATCH: dict[str, Any] = {"input_ids": IDS, "labels": IDS}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offloading, "MIN_BYTES", 1)
    monkeypatch.setattr(activation_offloading, "SLAB_BYTES", 5000)  # less than an activation; tensors span slabs


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().sum().backward()
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize("level", ["none", "mlp", "full"])
def test_gradients_have_the_same_bits(
    level: CheckpointingLevel, chunk_tokens: int | None, pico: Pico, tmp_path: Path
) -> None:
    model = adapted_model(tmp_path, pico("llama")).model
    fused = install(model, lambda: label_losses(model, **BATCH))
    LayerCheckpointing(model.train(), fused.mlps).set(level)
    offloading = ActivationOffloading(CPU)

    def run() -> Tensor:
        return label_losses(model, chunk_tokens, **BATCH).nll

    def offloaded() -> Tensor:
        with offloading.forward_pass(model):
            return run()

    expected = gradients(model, run)
    for _ in range(2):
        actual = gradients(model, offloaded)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


class Chain(nn.Module):
    """Linear layers that save their input, and nothing else except weights."""

    def __init__(self, depth: int, width: int = 32) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def run_chain(chain: Chain, offloading: ActivationOffloading) -> Tensor:
    with offloading.forward_pass(chain):
        y: Tensor = chain(torch.ones(50, 32))
    return y


def num_on_device(offloading: ActivationOffloading) -> int:
    return sum(entry.on_device is not None for entry in offloading._offloaded)


def test_at_most_two_are_on_the_device_and_the_host_stores_one_pass() -> None:
    chain, offloading, seen = Chain(6), ActivationOffloading(CPU), []
    for step in chain.steps:
        step.register_forward_pre_hook(lambda *_: seen.append(num_on_device(offloading)))
        step.register_full_backward_hook(lambda *_: seen.append(num_on_device(offloading)))
    sizes = []
    for _ in range(3):
        run_chain(chain, offloading).sum().backward()
        assert num_on_device(offloading) == 0
        sizes.append(len(offloading._slabs._slabs))
    assert max(seen) == 1, "besides the one in use"
    assert set(sizes) == {-(-6 * 50 * 32 * 4 // 5000)}


def test_last_tensor_stays_on_the_device() -> None:
    chain, offloading = Chain(3), ActivationOffloading(CPU)
    y = run_chain(chain, offloading)
    on_device = [entry.on_device for entry in offloading._offloaded]
    assert [tensor is None for tensor in on_device] == [True, True, False]
    for piece in offloading._offloaded[-1].host:
        piece.zero_()
    y.sum().backward()
    last = chain.steps[-1].weight.grad
    assert last is not None
    assert last.abs().min() > 0


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "bfloat16", "integers"])
def test_tensors_keep_their_values_and_memory_order(kind: str) -> None:
    x = torch.randn(6, 10)
    saved = {
        "transposed": x.T, "sliced": x[:, 2:5], "expanded": x[:1].expand(6, 10), "bfloat16": x.bfloat16(),
        "integers": torch.arange(17),
    }[kind]  # fmt: skip
    found = []

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, leaf: Tensor) -> Tensor:
            ctx.save_for_backward(saved, torch.ones(500))
            return leaf * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            found.append(ctx.saved_tensors[0])
            return grad

    with ActivationOffloading(CPU).forward_pass(nn.Linear(1, 1)):
        y = Save.apply(torch.ones(2, requires_grad=True))
    y.sum().backward()
    assert torch.equal(found[0], saved)
    assert found[0].dtype == saved.dtype
    if kind == "transposed":
        assert found[0].stride() == saved.stride()


def test_gradient_computed_in_the_forward_pass() -> None:
    """As the chunked loss does for the hidden states."""
    chain, head = Chain(3), nn.Linear(32, 8)

    def run(offloading: ActivationOffloading | None) -> list[Tensor]:
        chain.zero_grad()
        grads = []
        with offloading.forward_pass(chain) if offloading else nullcontext():
            y = chain(torch.linspace(-1, 1, 50 * 32).view(50, 32))
            for chunk in y.detach().split(10):
                leaf = chunk.clone().requires_grad_()
                grads += torch.autograd.grad(head(leaf).exp().sum(), leaf)
        y.backward(torch.cat(grads))
        return [step.weight.grad.clone() for step in chain.steps]

    expected = run(None)
    for actual, other in zip(run(ActivationOffloading(CPU)), expected, strict=True):
        assert torch.equal(actual, other)


def test_small_tensors_and_weights_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offloading, "MIN_BYTES", 50 * 32 * 4 + 1)
    offloading = ActivationOffloading(CPU)
    run_chain(Chain(3), offloading).sum().backward()
    assert not offloading._offloaded


def test_two_forward_passes_before_a_backward_pass_are_an_error() -> None:
    chain, offloading = Chain(3), ActivationOffloading(CPU)
    early = run_chain(chain, offloading)
    run_chain(chain, offloading)
    with pytest.raises(RuntimeError, match="another forward pass reused the host memory"):
        early.sum().backward()


def test_tensor_changed_in_place_is_an_error() -> None:
    offloading, x = ActivationOffloading(CPU), torch.ones(50, 32)
    chain = Chain(2)

    def run() -> None:
        with offloading.forward_pass(chain):
            y = chain.steps[0](x)
            x.add_(1)
            chain.steps[1](y)

    with pytest.raises(
        TrainingError, match=r"train\.activation_offloading: true, but this model changes a tensor in place"
    ):
        run()


def test_host_without_memory_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offloading, "HOST_RESERVE_BYTES", 1 << 60)
    with pytest.raises(MemoryError, match=r"the host has .* GB left, beside 0\.0 GB of activations") as raised:
        Slabs(pinned=False).allocate(10)
    assert is_out_of_memory(raised.value)


def test_pageable_memory_when_page_locking_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty, pinned = torch.empty, []

    def fail_to_pin(*size: int, pin_memory: bool = False, **keywords: Any) -> Tensor:
        pinned.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCompile with ...")
        return empty(*size, **keywords)

    monkeypatch.setattr(torch, "empty", fail_to_pin)
    pieces = Slabs(pinned=True).allocate(12000)
    assert [len(piece) for piece in pieces] == [5000, 5000, 2000]
    assert pinned == [True, False, False, False]
    assert caplog.messages == [
        "activation offloading: no more page-locked memory (CUDA error: out of memory); slower copies"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or IS_FAKE, reason="needs a CUDA device")
def test_on_a_gpu_it_takes_less_memory_for_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offloading, "SLAB_BYTES", 64 << 20)
    device, depth, width, rows = torch.device("cuda", 0), 24, 2048, 8192
    chain = Chain(depth, width).to(device)
    offloading = ActivationOffloading(device)
    x = torch.randn(rows, width, device=device)

    def run() -> Tensor:
        with offloading.forward_pass(chain):
            y: Tensor = chain(x)
        return y

    def peak(step: Callable[[], Tensor]) -> int:
        """Return the memory of a step, without weights and gradients."""
        chain.zero_grad(set_to_none=False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step().sum().backward()
        return torch.cuda.max_memory_allocated() - before

    expected = gradients(chain, lambda: chain(x))
    saved = peak(lambda: chain(x))
    for _ in range(3):
        actual = gradients(chain, run)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert peak(run) < saved - (depth - 6) * rows * width * 4
    assert all(slab.is_pinned() for slab in offloading._slabs._slabs)
