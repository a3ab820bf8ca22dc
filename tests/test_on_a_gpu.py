"""Whole runs on a GPU: load, parity checks, training, resume, evaluation, merge, check, generation.

The device may be a fake one (`tests.fake_cuda`): then these tests compute on the CPU, and fail where tensors of two devices
meet. `tests/test_fake_cuda.py` runs them so.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.export import check_adapter, fresh_check, verify
from qlora_train.kernels import document_varlen
from qlora_train.pipeline import evaluate
from qlora_train.report import EvalSettings
from tests import fake_cuda
from tests.kernels.varlen import plain_varlen
from tests.runs import losses, train_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
Pico = Callable[..., Path]

FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "falcon", "gpt_neox",
    "qwen3_next",
)  # fmt: skip
SHORT = ("train.max_steps=2", "train.eval_steps=2", "export.max_loss_increase=10")
MERGED = (*SHORT, "export.merge=true")


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Under the fake device, have its process check saved models too, and fail on a mismatch that the product catches."""
    if not fake_cuda.IS_FAKE:
        yield
        return

    def check_here(_where: Path, code: str, reference: Path, *, batch_size: int, error: Any) -> fresh_check.Check:
        answer = fresh_check._measure(code, reference, batch_size)
        agreement = fresh_check.Agreement(**answer["agreement"])
        return fresh_check.Check(answer["loss"], agreement, tuple(answer["token_differences"]))

    for module in (check_adapter, verify):
        monkeypatch.setattr(module, "check_in_fresh_process", check_here)
    monkeypatch.setattr(document_varlen, "varlen_attn", plain_varlen)  # torch's has no kernel for the CPU
    fake_cuda.mismatches.clear()
    yield
    assert fake_cuda.mismatches == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_trains_evaluates_merges_and_answers(family: str, pico: Pico, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico(family), *MERGED)
    assert all(map(math.isfinite, losses(run)))
    assert run.facts()["device"] == torch.cuda.get_device_name()
    results = evaluate(run, EvalSettings(max_new_tokens=4, batch_size=2))
    assert {"base", "adapter", "merged"} < results.keys()
    assert run.read_results()["adapter_check"]["passed"]
    assert document_varlen.works_on(torch.device("cuda", 0)), "first tried where gradients are off"
