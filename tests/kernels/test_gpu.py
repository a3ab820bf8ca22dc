"""When operations stay with plain torch and bitsandbytes."""

import logging

import pytest
import torch

from qlora_train.kernels.gpu import has_kernels, runs_triton, works_on
from tests.kernels.interpreted import IS_INTERPRETED

pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="this process interprets kernels")


def test_tensors_on_the_cpu_stay_with_plain_torch() -> None:
    assert not has_kernels(torch.zeros(2, dtype=torch.uint8))
    assert not runs_triton(torch.zeros(2))


def test_where_triton_fails_it_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("qlora_train"), "propagate", True)
    works_on.cache_clear()
    device = torch.device("cpu")  # which Triton compiles for no more than for a GPU that is too old
    assert [works_on(device), works_on(device)] == [False, False]
    [message] = caplog.messages
    assert message.startswith("no Triton kernels on cpu, bitsandbytes and plain torch compute instead: ")
