"""Two ways of computing one model, compared: the loss and every gradient, on a few hundred tokens of its own data."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.kernels.lora_dropout import lora_dropout_off
from qlora_train.objectives.sft_loss import label_losses
from qlora_train.training.parity.preserve_state import preserve_model_state
from qlora_train.utils.device import catch_out_of_memory
from qlora_train.utils.errors import TrainingError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

NEGLIGIBLE = 1e-3
"""Share of the gradients' norm below which a tensor's is not judged by itself."""
SMALL = 1 / 16
"""Size of the numbers that stand in for zeros, against those of a fresh layer."""

FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What computing a model in another way raises where it does not work."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """What a model computed: the loss, and the gradient of everything that trains, by name, in host memory."""

    loss: float
    by_name: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class GradientDifference:
    """Relative differences, not a number or infinite where one of the two is.

    Attributes:
        loss: of the loss.
        gradient: of all gradients together.
        tensor: of the gradient of the tensor that differs most.
        worst: its name.
    """

    loss: float
    gradient: float
    tensor: float
    worst: str

    def said(self) -> str:
        """Say that it is too large."""
        return (
            f"it computes something else on this model (loss by {self.loss:.2g}, gradients by {self.gradient:.2g}, that of "
            f"{self.worst} by {self.tensor:.2g} of itself)"
        )


@dataclass(frozen=True, slots=True)
class Tolerances:
    """Largest relative differences: of the loss, of all gradients together, of the gradient of any one tensor."""

    loss: float
    gradient: float
    tensor: float

    def hold(self, found: GradientDifference) -> bool:
        """Say whether a difference is within them; false for what is not a number."""
        return found.loss <= self.loss and found.gradient <= self.gradient and found.tensor <= self.tensor


TOLERANCES = {
    torch.float32: Tolerances(1e-5, 1e-4, 1e-2),
    torch.bfloat16: Tolerances(2e-2, 0.15, 0.5),
    torch.float16: Tolerances(5e-3, 0.1, 0.5),
}
"""By compute dtype. Rounding alone makes up to 0.07 in bfloat16, where tokens near the border between two experts go to the
other one, and 0.01 without experts (tests/architectures); a wrong scale or a lost gradient makes 1 or more."""


def gradients_of(adapted: AdaptedModel, batch: Mapping[str, Any]) -> Gradients:
    """Return the mean loss of a batch and its gradients, in training mode and with the same random numbers every time.

    LoRA dropout is off: fused kernels and PEFT draw different masks, padded and padding-free rows too.

    Args:
        adapted: the model, which is as it was afterwards. Tensors of it that are zero are other numbers meanwhile: a fresh
            adapter lets no gradient through.
        batch: arguments of `label_losses`.
    """
    model, dtype, device = adapted.model, adapted.loaded.compute_dtype, adapted.loaded.device
    trained = trainable_state(model)
    with preserve_model_state(model), lora_dropout_off(model.modules()), _nothing_is_zero(trained):
        torch.manual_seed(0)
        model.train()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = label_losses(model, **batch).nll.mean()
        loss.backward()
        found = {name: parameter.grad.cpu() for name, parameter in trained.items() if parameter.grad is not None}
    return Gradients(float(loss.detach()), found)


@contextmanager
def _nothing_is_zero(trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Give every trained tensor that is zero small numbers for a while."""
    generator = torch.Generator().manual_seed(0)
    zeros = [parameter for parameter in trained.values() if not parameter.any()]
    with torch.no_grad():
        for parameter in zeros:
            numbers = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(numbers * (SMALL / math.sqrt(parameter.shape[-1])))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def compare_gradients(wanted: Gradients, found: Gradients) -> GradientDifference:
    """Return by how much `found` differs from `wanted`; a gradient that only one of them has differs without bound."""
    loss = abs(found.loss - wanted.loss) / abs(wanted.loss)
    odd = sorted(wanted.by_name.keys() ^ found.by_name.keys())
    if odd:
        return GradientDifference(loss, math.inf, math.inf, odd[0])
    norms = {name: float(gradient.norm()) for name, gradient in wanted.by_name.items()}
    errors = {name: float((found.by_name[name] - gradient).norm()) for name, gradient in wanted.by_name.items()}
    whole = math.hypot(*norms.values())
    relative = {name: errors[name] / norm for name, norm in norms.items() if not norm <= NEGLIGIBLE * whole}
    worst = max(relative, key=lambda name: (math.isnan(relative[name]), relative[name]))
    return GradientDifference(loss, math.hypot(*errors.values()) / whole, relative[worst], worst)


@contextmanager
def full_checkpointing(model: Any) -> Iterator[None]:
    """Recompute every layer in the backward pass, where the architecture supports it; afterwards as before.

    A parity check then fits wherever training does, and does not grow with the number of layers.
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
    """Let Transformers recompute every layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases have another name for it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def within_memory(what: str, sizes: Sequence[tuple[int, int]], compare: Callable[[int, int], Result]) -> Result:
    """Return the result of a parity check on the first size that fits into memory.

    Args:
        what: is checked, for people.
        sizes: rows and tokens per row, the largest first.
        compare: computes both ways on that many rows and tokens per row.

    Raises:
        TrainingError: the smallest size does not fit.
    """
    for num_rows, num_tokens in sizes:
        found, reason = catch_out_of_memory(partial(compare, num_rows, num_tokens))
        if reason is None:
            return found  # type: ignore[return-value]
        logger.warning("%s: parity check on %d x %d tokens: out of memory", what, num_rows, num_tokens)
    raise TrainingError(
        f"{what}: out of memory in the parity check on {num_rows} x {num_tokens} tokens ({reason}); free memory that "
        "others use, lower lora.r, or take a smaller model"
    )
