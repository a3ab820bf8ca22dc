"""Loss and gradients of a model, and the difference between two ways of computing them."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.kernels.lora_dropout import lora_dropout_off
from qlora_train.objectives.label_losses import label_losses
from qlora_train.training.parity.preserve_state import preserve_model_state

NEGLIGIBLE = 1e-3
"""Tensors below this share of the total gradient norm are not compared one by one."""
RANDOM_SCALE = 1 / 16
"""Standard deviation of the values that replace zeros, relative to 1 / sqrt(in_features)."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """The loss, and the gradient of every trained tensor by name, on the CPU."""

    loss: float
    by_name: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class GradientDifference:
    """Relative differences; NaN or infinite if either side is.

    Attributes:
        loss: of the loss.
        gradient: of all gradients together.
        tensor: of the tensor that differs most.
        worst: its name.
    """

    loss: float
    gradient: float
    tensor: float
    worst: str

    def __str__(self) -> str:
        return f"loss by {self.loss:.2g}, gradients by {self.gradient:.2g}, at most {self.tensor:.2g} in {self.worst}"


@dataclass(frozen=True, slots=True)
class Tolerances:
    """Max relative differences of the loss, of all gradients together, and of any one tensor's gradient."""

    loss: float
    gradient: float
    tensor: float

    def allow(self, difference: GradientDifference) -> bool:
        """Return whether a difference is within them; false for NaN."""
        return (
            difference.loss <= self.loss
            and difference.gradient <= self.gradient
            and difference.tensor <= self.tensor
        )  # fmt: skip


TOLERANCES = {
    torch.float32: Tolerances(1e-5, 1e-4, 1e-2),
    torch.bfloat16: Tolerances(2e-2, 0.15, 0.5),
    torch.float16: Tolerances(5e-3, 0.1, 0.5),
}
"""By compute dtype. bfloat16 rounding alone makes up to 0.01, and 0.07 with experts, where tokens near a tie are routed
differently (tests/architectures); a wrong scale or a lost gradient makes 1 or more."""


def gradients_of(adapted: AdaptedModel, batch: Mapping[str, Any]) -> Gradients:
    """Compute the mean loss of a batch and its gradients, in training mode and with a fixed seed.

    LoRA dropout is off: fused kernels and PEFT draw different masks, and so do padded and flattened rows.

    Args:
        adapted: the model; its state is preserved. Zero tensors are randomized: a new adapter has zero gradients.
        batch: arguments of `label_losses`.
    """
    model, dtype, device = adapted.model, adapted.loaded.compute_dtype, adapted.loaded.device
    trained = trainable_state(model)
    with preserve_model_state(model), lora_dropout_off(model.modules()), _randomized_zeros(trained):
        torch.manual_seed(0)
        model.train()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = label_losses(model, **batch).nll.mean()
        loss.backward()
        gradients = {name: parameter.grad.cpu() for name, parameter in trained.items() if parameter.grad is not None}
    return Gradients(float(loss.detach()), gradients)


@contextmanager
def _randomized_zeros(trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)
    zeros = [parameter for parameter in trained.values() if not parameter.any()]
    with torch.no_grad():
        for parameter in zeros:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * (RANDOM_SCALE / math.sqrt(parameter.shape[-1])))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def compare_gradients(expected: Gradients, actual: Gradients) -> GradientDifference:
    """Return the difference of `actual` from `expected`; infinite if only one of them has a tensor."""
    loss = abs(actual.loss - expected.loss) / abs(expected.loss)
    unmatched = sorted(expected.by_name.keys() ^ actual.by_name.keys())
    if unmatched:
        return GradientDifference(loss, math.inf, math.inf, unmatched[0])
    norms = {name: float(gradient.norm()) for name, gradient in expected.by_name.items()}
    errors = {name: float((actual.by_name[name] - gradient).norm()) for name, gradient in expected.by_name.items()}
    total = math.hypot(*norms.values())
    relative = {name: errors[name] / norm for name, norm in norms.items() if not norm <= NEGLIGIBLE * total}
    worst = max(relative, key=lambda name: (math.isnan(relative[name]), relative[name]))
    return GradientDifference(loss, math.hypot(*errors.values()) / total, relative[worst], worst)


@contextmanager
def full_checkpointing(model: Any) -> Iterator[None]:
    """Checkpoint every layer, if the architecture supports it, and restore the previous state.

    A parity check then fits wherever training does: its memory does not grow with the number of layers.
    """
    modules = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    before = [module.gradient_checkpointing for module in modules]
    if model.supports_gradient_checkpointing:
        enable_full_checkpointing(model)
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.gradient_checkpointing = enabled


def enable_full_checkpointing(model: Any) -> None:
    """Let Transformers checkpoint every layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases rename the method
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
