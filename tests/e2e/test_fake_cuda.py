"""Device rules on a GPU and on the fake one; every test that needs a GPU, on the fake one."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.conftest import DEVELOPMENT_PACKAGES
from tests.support import fake_cuda

ROOT = Path(__file__).parents[2]
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + torch.ones(4),
        lambda x: x.add_(torch.ones(4)),
        lambda x: torch.ones(4).add_(x[0]),
        lambda x: torch.cat([x, torch.ones(1, 4)]),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: functional.embedding(torch.tensor([0]), x),
        lambda x: x @ torch.ones(4),
        lambda x: torch.ones(3, 4)[x > 0],
        lambda x: (x * x.clone().requires_grad_()).backward(torch.ones(3, 4)),
        lambda x: x.numpy(),
    ],
)
def test_tensors_of_two_devices_do_not_mix(compute: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        compute(torch.ones(3, 4, device="cuda"))
    fake_cuda.mismatches.clear()


@pytest.mark.gpu
@needs_a_gpu
def test_operations_that_cross_devices() -> None:
    x = torch.ones(3, 4).to("cuda").requires_grad_()
    assert x.is_cuda
    assert x.device == x[0].device == x.detach().device == x.to(torch.bfloat16).device == torch.device("cuda", 0)
    for made in (x + 1, x * torch.tensor(2.0), x[torch.tensor([0, 2])], torch.zeros_like(x), x.new_zeros(2), x.bool()):
        assert made.device == x.device
    for made in (
        torch.zeros(2),
        x.cpu(),
        x.to("cpu", torch.float16),
        torch.tensor(x.tolist()),
        torch.zeros(4).copy_(x[0]),
    ):
        assert made.device.type == "cpu"
    (x.cpu().sum() * 2).backward()
    assert x.grad is not None
    assert x.grad.device == x.device
    assert torch.nn.Linear(2, 3).to("cuda").weight.is_cuda
    assert fake_cuda.mismatches == []


WITHOUT_DEVELOPMENT_PACKAGES = f"""from importlib.machinery import PathFinder
class Find:
    find = PathFinder.find_spec
    def __call__(self, name, *more):
        return None if name in {DEVELOPMENT_PACKAGES!r} else Find.find(name, *more)
PathFinder.find_spec = Find()
import pytest
raise SystemExit(pytest.main(["-m", "gpu", "-vv", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "tests"]))"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="these tests run on this device")
def test_every_test_that_needs_a_gpu_passes_on_the_fake_one_without_development_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEVELOPMENT_PACKAGES],
        env={**os.environ, "FAKE_CUDA": "1"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    for file in ("kernels/test_triton_model.py", "e2e/test_on_a_gpu.py", "training/test_activation_offloading.py"):
        assert f"tests/{file}::" in done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[1]) > 20
