"""Expandable segments are on where supported; the user's value wins."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from qlora_train.utils.device import ALLOCATOR_VARIABLES, expand_segments
from qlora_train.utils.errors import explain
from tests.support.fake_cuda import IS_FAKE

SETTINGS = (
    "import os; from qlora_train.utils.device import select_device; select_device(); import torch; "
    "print(torch._C._accelerator_getAllocatorSettings())"
)


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.mark.skipif(sys.platform != "linux" or "microsoft" in platform.release().lower(), reason="not supported there")
@pytest.mark.parametrize("given", [{}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}], ids=["unset", "set"])
def test_torch_reads_the_setting_before_cuda_is_initialised(given: dict[str, str], unset: None) -> None:
    command = [sys.executable, "-c", SETTINGS]
    found = subprocess.check_output(command, text=True, env={**os.environ, **given}).strip()
    assert found == given.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@pytest.mark.parametrize(
    ("system", "release", "expands"),
    [("linux", "6.8.0-51-generic", True), ("linux", "5.15.167-microsoft-standard-WSL2", False), ("win32", "11", False)],
)
def test_expandable_segments_only_where_supported(
    system: str, release: str, expands: bool, unset: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    expand_segments()
    assert ("PYTORCH_ALLOC_CONF" in os.environ) == expands


def test_deprecated_variable_of_the_user_wins(unset: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    expand_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_unsupported_driver_is_one_line_with_the_workaround() -> None:
    line = explain(RuntimeError("CUDA driver error: operation not supported"))
    assert line is not None
    assert "PYTORCH_ALLOC_CONF=expandable_segments:False" in line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or IS_FAKE, reason="needs a CUDA device")
def test_segments_of_a_gpu_expand(unset: None) -> None:
    code = SETTINGS.rpartition("print")[0] + (
        "torch.zeros(1, device='cuda'); print(torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments'])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "True"
