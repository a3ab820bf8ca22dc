"""Offloaded activations: the same bits, little device memory, an error instead of a full host."""

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
from qlora_train.training.memory.activation_offloading import offload_activations
from qlora_train.utils.errors import is_out_of_memory
from tests.support.fake_cuda import IS_FAKE
from tests.support.runs import adapted_model

Pico = Callable[..., Path]
IDS = torch.arange(60).reshape(3, 20) * 5 % 300 + 4
BATCH: dict[str, Any] = {"input_ids": IDS, "labels": IDS}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offloading, "MIN_BYTES", 1)


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

    def run() -> Tensor:
        return label_losses(model, chunk_tokens, **BATCH).nll

    def offloaded() -> Tensor:
        with offload_activations(model, CPU):
            return run()

    expected, actual = gradients(model, run), gradients(model, offloaded)
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
            ctx.save_for_backward(saved)
            return leaf * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            found.append(ctx.saved_tensors[0])
            return grad

    with offload_activations(nn.Linear(1, 1), CPU):
        y = Save.apply(torch.ones(2, requires_grad=True))
    y.sum().backward()
    assert torch.equal(found[0], saved)
    assert found[0].dtype == saved.dtype
    if kind == "transposed":
        assert found[0].stride() == saved.stride()


def test_only_activations_of_some_size_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(3)
    copied: list[torch.Size] = []
    copy = torch.autograd.graph.save_on_cpu

    def watched(*arguments: Any, **keywords: Any) -> Any:
        host = copy(*arguments, **keywords)
        pack = host.pack_hook
        host.pack_hook = lambda tensor: (copied.append(tensor.shape), pack(tensor))[1]
        return host

    monkeypatch.setattr(activation_offloading, "save_on_cpu", watched)
    for min_bytes, expected in ((1, 3), (50 * 32 * 4 + 1, 0)):
        monkeypatch.setattr(activation_offloading, "MIN_BYTES", min_bytes)
        copied.clear()
        with offload_activations(chain, CPU):
            chain(torch.ones(50, 32)).sum().backward()
        assert copied == [torch.Size([50, 32])] * expected


def test_host_without_memory_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offloading, "HOST_RESERVE_BYTES", 1 << 60)
    chain = Chain(1)
    with pytest.raises(MemoryError, match=r"the host has .* GB left") as raised, offload_activations(chain, CPU):
        chain(torch.ones(50, 32))
    assert is_out_of_memory(raised.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or IS_FAKE, reason="needs a CUDA device")
def test_on_a_gpu_it_takes_less_memory_for_the_same_bits() -> None:
    device, depth, width, rows = torch.device("cuda", 0), 24, 2048, 8192
    chain = Chain(depth, width).to(device)
    x = torch.randn(rows, width, device=device)

    def run(*, offload: bool) -> Tensor:
        with offload_activations(chain, device) if offload else nullcontext():
            y: Tensor = chain(x)
        return y

    def peak(*, offload: bool) -> int:
        """Return the memory of a step, without weights and gradients."""
        chain.zero_grad(set_to_none=False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(offload=offload).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    expected = gradients(chain, lambda: run(offload=False))
    saved = peak(offload=False)
    actual = gradients(chain, lambda: run(offload=True))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert peak(offload=True) < saved - (depth - 6) * rows * width * 4
