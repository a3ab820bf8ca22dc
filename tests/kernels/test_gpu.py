"""When operations run in torch and bitsandbytes, and properties of the kernels on a GPU other than their results."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora_train.kernels.ops.dequantize import dequantize
from qlora_train.kernels.ops.dispatch import has_kernels, runs_triton, works_on
from tests.support.fake_cuda import IS_FAKE
from tests.support.triton_interpreter import IS_INTERPRETED

pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="this process interprets kernels")


def test_no_kernels_for_cpu_tensors() -> None:
    assert not has_kernels(torch.zeros(2, dtype=torch.uint8))
    assert not runs_triton(torch.zeros(2))


def test_failing_triton_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("qlora_train"), "propagate", True)
    works_on.cache_clear()
    device = torch.device("cpu")  # Triton cannot compile for it, as for a GPU that is too old
    with caplog.at_level(logging.WARNING, logger="qlora_train"):
        assert not works_on(device)
        assert caplog.messages[0].startswith("Triton kernels: off on cpu, bitsandbytes and torch compute instead (")
        caplog.clear()
        assert not works_on(device)
        assert not caplog.messages


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available() or IS_FAKE, reason="needs a CUDA device")


@pytest.mark.gpu
@needs_a_gpu
def test_probe_fails_without_a_c_compiler(tmp_path: Path) -> None:
    code = (
        "import torch; from qlora_train.kernels.ops.dispatch import works_on; print(works_on(torch.device('cuda', 0)))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")}
    environment |= {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
    assert "C compiler" in done.stderr


@pytest.mark.gpu
@needs_a_gpu
def test_cuda_graph_replays_every_kernel_on_new_values() -> None:
    from qlora_train.kernels.ops import cross_entropy_triton, gated_triton, rms_norm_triton, rotary_triton
    from qlora_train.kernels.ops.rms_norm import Variant

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    packed, state = bnb.quantize_4bit(numbers(64, 128), compress_statistics=True, quant_type="nf4")
    x, up, grad, weight, cos, sin = numbers(6, 128), numbers(6, 128), numbers(6, 128), *numbers(3, 1, 1, 6, 128)
    variant, targets = Variant(0.0, rounds_first=True), torch.arange(6, device="cuda")
    assert has_kernels(packed)

    def compute() -> list[Tensor]:
        y, scale = rms_norm_triton.forward(x, weight[0, 0, 0], 1e-6, variant)
        logits = x.clone()
        return [
            *(cross_entropy_triton.losses_and_gradient_(logits, targets), logits),
            dequantize(packed, state, torch.bfloat16),
            dequantize(packed, state, torch.bfloat16, out=torch.empty(64, 256, device="cuda", dtype=x.dtype)[:, :128]),
            *(y, scale, rms_norm_triton.backward(grad, x, weight[0, 0, 0], scale, variant)),
            *(gated_triton.forward(x, up, "silu"), *gated_triton.backward(grad, x, up, "silu")),
            *(rotary_triton.forward(x[None, None], cos, sin), rotary_triton.backward(grad[None, None], cos, sin)),
        ]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = compute()
    for given in (x, up, grad, weight, cos, sin, packed):
        given.copy_(given.flip(0, -1))
    packed.copy_(packed.roll(7))
    graph.replay()
    for repeated, expected in zip(actual, compute(), strict=True):
        assert torch.equal(repeated, expected)
