"""Activations on the host: the same bits, two tensors here at a time, memory that is used again, nothing silently wrong.

On a CPU the copies are made at once; the order of everything else is that of a GPU.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_train.kernels.install import install
from qlora_train.objectives.sft_loss import label_losses
from qlora_train.training.memory import activation_offloading
from qlora_train.training.memory.activation_checkpointing import CheckpointingLevel, LayerCheckpointing
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
    monkeypatch.setattr(activation_offloading, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(activation_offloading, "SLAB_BYTES", 5000)  # less than an activation, and no multiple of one


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().sum().backward()
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize("level", ["none", "mlp", "full"])
def test_a_model_has_the_same_bits(level: CheckpointingLevel, pico: Pico, tmp_path: Path) -> None:
    model = adapted_model(tmp_path, pico("llama")).model
    fast = install(model, lambda: label_losses(model, **BATCH))
    LayerCheckpointing(model.train(), fast.mlps).set(level)
    moving = ActivationOffloading(CPU)

    def run() -> Tensor:
        with moving.forward_pass(model):
            return label_losses(model, **BATCH).nll

    wanted = gradients(model, lambda: label_losses(model, **BATCH).nll)
    for _ in range(2):
        found = gradients(model, run)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class Chain(nn.Module):
    """Steps that save their input each, and nothing else that is not a weight."""

    def __init__(self, depth: int, width: int = 32) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def run_chain(chain: Chain, moving: ActivationOffloading) -> Tensor:
    with moving.forward_pass(chain):
        y: Tensor = chain(torch.ones(50, 32))
    return y


def num_here(moving: ActivationOffloading) -> int:
    return sum(moved.here is not None for moved in moving._moved)


def test_two_at_most_are_here_at_a_time_and_the_host_has_room_for_one_pass() -> None:
    chain, moving, seen = Chain(6), ActivationOffloading(CPU), []
    for step in chain.steps:
        step.register_forward_pre_hook(lambda *_: seen.append(num_here(moving)))
        step.register_full_backward_hook(lambda *_: seen.append(num_here(moving)))
    sizes = []
    for _ in range(3):
        run_chain(chain, moving).sum().backward()
        assert num_here(moving) == 0
        sizes.append(len(moving._slabs._slabs))
    assert max(seen) == 1, "beside the one that is used"
    assert set(sizes) == {-(-6 * 50 * 32 * 4 // 5000)}


def test_what_left_last_does_not_have_to_come_back() -> None:
    chain, moving = Chain(3), ActivationOffloading(CPU)
    y = run_chain(chain, moving)
    here = [moved.here for moved in moving._moved]
    assert [tensor is None for tensor in here] == [True, True, False]
    for moved in moving._moved[-1:]:
        for piece in moved.host:
            piece.zero_()
    y.sum().backward()
    last = chain.steps[-1].weight.grad
    assert last is not None
    assert last.abs().min() > 0


@pytest.mark.parametrize("shape", ["transposed", "sliced", "expanded", "bfloat16", "integers"])
def test_tensors_come_back_with_their_numbers_and_the_order_of_their_memory(shape: str) -> None:
    x = torch.randn(6, 10)
    saved = {
        "transposed": x.T, "sliced": x[:, 2:5], "expanded": x[:1].expand(6, 10), "bfloat16": x.bfloat16(),
        "integers": torch.arange(17),
    }[shape]  # fmt: skip
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
    if shape == "transposed":
        assert found[0].stride() == saved.stride()


def test_a_gradient_that_is_made_in_the_forward_pass_takes_its_tensors_back() -> None:
    """As the loss of a frozen head does, chunk by chunk, behind all layers."""
    chain, head = Chain(3), nn.Linear(32, 8)

    def run(moving: ActivationOffloading | None) -> list[Tensor]:
        chain.zero_grad()
        made = []
        with moving.forward_pass(chain) if moving else nullcontext():
            y = chain(torch.linspace(-1, 1, 50 * 32).view(50, 32))
            for some in y.detach().split(10):
                leaf = some.clone().requires_grad_()
                made += torch.autograd.grad(head(leaf).exp().sum(), leaf)
        y.backward(torch.cat(made))
        return [step.weight.grad.clone() for step in chain.steps]

    wanted = run(None)
    for found, other in zip(run(ActivationOffloading(CPU)), wanted, strict=True):
        assert torch.equal(found, other)


def test_small_tensors_and_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offloading, "SMALLEST_BYTES", 50 * 32 * 4 + 1)
    moving = ActivationOffloading(CPU)
    run_chain(Chain(3), moving).sum().backward()
    assert not moving._moved


def test_a_graph_whose_host_memory_another_pass_has_taken_is_refused() -> None:
    chain, moving = Chain(3), ActivationOffloading(CPU)
    early = run_chain(chain, moving)
    run_chain(chain, moving)
    with pytest.raises(RuntimeError, match="another forward pass took the host memory"):
        early.sum().backward()


def test_a_tensor_that_is_changed_in_place_is_refused() -> None:
    moving, x = ActivationOffloading(CPU), torch.ones(50, 32)
    chain = Chain(2)

    def run() -> None:
        with moving.forward_pass(chain):
            y = chain.steps[0](x)
            x.add_(1)
            chain.steps[1](y)

    with pytest.raises(
        TrainingError, match=r"train\.activation_offloading: true, but this model changes a tensor in place"
    ):
        run()


def test_a_host_without_memory_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offloading, "HOST_RESERVE_BYTES", 1 << 60)
    with pytest.raises(MemoryError, match=r"the host has .* GB left, beside 0\.0 GB of activations") as raised:
        Slabs(pinned=False).take(10)
    assert is_out_of_memory(raised.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or IS_FAKE, reason="needs a CUDA device")
def test_on_a_gpu_it_takes_less_memory_for_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offloading, "SLAB_BYTES", 64 << 20)
    device, depth, width, rows = torch.device("cuda", 0), 24, 2048, 8192
    chain = Chain(depth, width).to(device)
    moving = ActivationOffloading(device)
    x = torch.randn(rows, width, device=device)

    def run() -> Tensor:
        with moving.forward_pass(chain):
            y: Tensor = chain(x)
        return y

    def peak(way: Callable[[], Tensor]) -> int:
        """Return what a step takes beside weights and gradients."""
        chain.zero_grad(set_to_none=False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way().sum().backward()
        return torch.cuda.max_memory_allocated() - before

    wanted = gradients(chain, lambda: chain(x))
    kept = peak(lambda: chain(x))
    for _ in range(3):
        found = gradients(chain, run)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert peak(run) < kept - (depth - 6) * rows * width * 4
    assert all(slab.is_pinned() for slab in moving._slabs._slabs)
