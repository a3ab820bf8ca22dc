"""`run.deterministic` per family: operations without a deterministic algorithm on GPUs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_train.architectures import ARCHITECTURES
from qlora_train.kernels.install import install
from qlora_train.objectives.label_losses import label_losses
from qlora_train.training.parity.gradients import gradients_of
from qlora_train.utils.device import deterministic_algorithms
from qlora_train.utils.errors import explain
from tests.support.batches import BATCH
from tests.support.runs import adapted_model

aten = torch.ops.aten
NEVER = {
    aten.histc, aten.put, aten.put_, aten.median, aten.nanmedian, aten.kthvalue, aten.nll_loss2d_forward,
    aten.nll_loss2d_backward, aten.scatter_reduce, aten.scatter_reduce_,
}  # fmt: skip
FLOATS = {aten.cumsum, aten.cumsum_, aten.cumprod, aten.logcumsumexp}
"""Operations that raise on CUDA according to `torch.use_deterministic_algorithms`: any dtype, and floats only."""


SCANS = {
    "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "olmo_hybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text",
}  # fmt: skip
"""Families with linear attention or state spaces, which Transformers computes with `cumsum`."""


class RefuseAsCuda(TorchDispatchMode):
    """Raise on any device for operations that raise on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        floats = packet in FLOATS and args[0].is_floating_point()
        weighted = packet is aten.bincount and (args[1] if len(args) > 1 else kwargs.get("weights")) is not None
        if packet in NEVER or floats or weighted:
            raise RuntimeError(f"{packet.__name__} does not have a deterministic implementation, but you set ...")
        return func(*args, **kwargs)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_training_is_deterministic_or_names_the_operation(
    model_type: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    with deterministic_algorithms(True):
        model = adapted_model(tmp_path, pico(model_type))
        with RefuseAsCuda():
            if model_type in SCANS:
                with pytest.raises(RuntimeError) as caught:
                    gradients_of(model, BATCH)
                line = explain(caught.value)
                assert line is not None
                assert line.startswith("run.deterministic: true, but cumsum has no deterministic algorithm")
                return
            gradients_of(model, BATCH)
            install(model.model, lambda: label_losses(model.model, **BATCH))
            gradients_of(model, BATCH)
