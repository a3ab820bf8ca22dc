"""Whole models with every operation as a Triton kernel: gradients match PEFT and Transformers."""

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from qlora_train.kernels import expert_weights, frozen_weight
from qlora_train.kernels.install import install
from qlora_train.kernels.ops import dequantize
from qlora_train.objectives.label_losses import label_losses
from qlora_train.training.parity.gradients import compare_gradients, gradients_of
from tests.support.runs import adapted_model
from tests.support.triton_interpreter import DEVICE, needs_its_device, use_kernels

pytestmark = needs_its_device
IDS = torch.arange(60).reshape(3, 20) * 5 % 300 + 4


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Have every operation run as a kernel, and count how often each does."""
    counts: Counter[str] = Counter()
    use_kernels(monkeypatch)

    def count(name: str) -> None:
        kernels = import_module(f"qlora_train.kernels.ops.{name}_triton")
        forward = kernels.forward

        def counted(*arguments: Any) -> Any:
            counts[name] += 1
            return forward(*arguments)

        monkeypatch.setattr(kernels, "forward", counted)

    def by_triton(packed: Tensor, state: QuantState, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        counts["dequantize"] += 1
        return dequantize.by_triton(packed, state, dtype, out)

    for name in ("rms_norm", "gated", "rotary"):
        count(name)
    for module in (frozen_weight, expert_weights):
        monkeypatch.setattr(module, "dequantize", by_triton)
    return counts


@pytest.mark.parametrize(
    ("model_type", "operations"),
    [
        ("llama", {"dequantize", "rms_norm", "gated", "rotary"}),
        ("gemma3_text", {"dequantize", "rms_norm", "gated", "rotary"}),
        ("mixtral", {"dequantize", "rms_norm", "rotary"}),
    ],
)
def test_gradients_match_the_reference(
    model_type: str, operations: set[str], pico: Callable[..., Path], used: Counter[str], tmp_path: Path
) -> None:
    batch: dict[str, Any] = {"input_ids": IDS.to(DEVICE), "labels": IDS.to(DEVICE)}
    model = adapted_model(tmp_path, pico(model_type), "quantization.bnb_4bit_compute_dtype=float32")
    expected = gradients_of(model, batch)
    install(model.model, lambda: label_losses(model.model, **batch))
    used.clear()
    actual = gradients_of(model, batch)
    assert set(used) == operations
    assert compare_gradients(expected, actual).gradient < 1e-5
