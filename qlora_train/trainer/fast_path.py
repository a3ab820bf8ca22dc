"""Whether a run takes the fast path: tried on its own first rows against the plain one, before the first step.

Loss and every adapter gradient of both are compared on a few hundred tokens; where they differ by more than the rounding of
the compute dtype, the run stays on the plain path and says so. The verdict is kept in the run's folder, so that a run that
goes on takes the path that it began with.
"""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train import durable
from qlora_train.adapter import AdaptedModel, trainable_state
from qlora_train.checkpoint import RunFolder
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.data.batches import Collator, padding_multiple
from qlora_train.data.stream import RowStream
from qlora_train.device import free_memory
from qlora_train.errors import CheckpointError, first_line, is_out_of_memory
from qlora_train.kernels.fast_path import FastPath, install
from qlora_train.loss import IGNORED, label_losses

logger = logging.getLogger(__name__)

NUM_ROWS, ROW_TOKENS = 4, 128
"""Rows of the comparison, and the tokens of each that are taken."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest relative differences: of the loss, of all gradients together, of the gradient of any one tensor."""

    loss: float
    gradient: float
    tensor: float


BOUNDS = {
    torch.float32: Bounds(1e-5, 1e-4, 1e-2),
    torch.bfloat16: Bounds(2e-2, 0.15, 0.5),
    torch.float16: Bounds(5e-3, 0.05, 0.5),
}
"""By compute dtype. What rounding alone does was measured on every architecture (tests/architectures); a tensor without its
scale, or a gradient that is lost, differs by 1 or more."""
NEGLIGIBLE = 1e-3
"""Share of the gradient's norm below which a tensor is not judged by itself."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the comparison found.

    Attributes:
        run_id: the run's.
        on: the differences are within the bounds.
        problem: why it is off, for people.
        loss: relative difference of the loss; None where the fast path failed.
        gradient: of all gradients together.
        tensor: of the gradient of the tensor that differs most.
        worst: its name.
    """

    run_id: str
    on: bool
    problem: str = ""
    loss: float | None = None
    gradient: float | None = None
    tensor: float | None = None
    worst: str = ""


def choose_fast_path(adapted: AdaptedModel, data: PreparedData, config: RunConfig, run: RunFolder) -> FastPath | None:
    """Put the fast path into a model where it computes what the plain one does; None where it stays plain.

    Args:
        adapted: the model.
        data: the comparison takes its text from the first training rows.
        config: the run's settings.
        run: remembers the verdict.

    Raises:
        CheckpointError: the verdict of this run cannot be read.
    """
    if not config.train.fast_path:
        logger.info("fast path: off (train.fast_path: false)")
        return None
    batch: dict[str, Any] = _first_tokens(adapted, data)
    known = _known_verdict(run)
    if known is not None and not known.on:
        logger.warning("fast path: off, as this run began (%s)", run.fast_path_file)
        return None
    run_tokens = lambda: label_losses(adapted.model, **batch)  # noqa: E731
    if known is None:
        plain = _losses_and_gradients(adapted, batch)
        fast = install(adapted.model, run_tokens)
        verdict = _verdict(adapted, plain, batch, run.facts()["run_id"])
        durable.write_text(run.fast_path_file, json.dumps(asdict(verdict), indent=2) + "\n")
        if not verdict.on:
            fast.uninstall()
            logger.warning("fast path: OFF: %s; training goes on as PEFT and Transformers compute it, and slower; please "
                           "report this model", verdict.problem)  # fmt: skip
            return None
        logger.info("fast path: what the plain one computes, on %d tokens (loss by %.1g, gradients by %.1g)",
                    batch["input_ids"].numel(), verdict.loss, verdict.gradient)  # fmt: skip
    else:
        fast = install(adapted.model, run_tokens)
    logger.info("fast path: %s", fast.described())
    return fast


def _first_tokens(adapted: AdaptedModel, data: PreparedData) -> dict[str, Any]:
    """Return the beginnings of the first training rows as a padded batch in which every token is a label."""
    rows: Any = (
        data.train.head() if isinstance(data.train, RowStream) else (data.train[i] for i in range(len(data.train)))
    )
    loaded, cut = adapted.loaded, slice(None, ROW_TOKENS)
    taken = [replace(row, input_ids=row.input_ids[cut], loss_mask=row.loss_mask[cut]) for row in islice(rows, NUM_ROWS)]
    batch = Collator(loaded.tokenizer.pad_token_id, padding_multiple(loaded.device))(list(enumerate(taken)))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return {name: tensor.to(loaded.device) for name, tensor in batch.items() if name != "row"}


def _known_verdict(run: RunFolder) -> Verdict | None:
    content = run.fast_path()
    try:
        verdict = Verdict(**content) if content else None
    except TypeError:
        raise CheckpointError(f"{run.fast_path_file}: is not as it was written; restore it, or delete it") from None
    return verdict if verdict is not None and verdict.run_id == run.facts()["run_id"] else None


# --- the comparison ---------------------------------------------------------------------------------------------------


def _losses_and_gradients(adapted: AdaptedModel, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of a batch, in training mode; the model is as it was afterwards."""
    model, dtype, device = adapted.model, adapted.loaded.compute_dtype, adapted.loaded.device
    trained = trainable_state(model)
    was_training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _nothing_is_zero(trained):
        torch.manual_seed(0)
        model.train()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = label_losses(model, **batch).nats.mean()
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    free_memory()
    return loss.detach(), gradients


@contextmanager
def _nothing_is_zero(trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Give every trained tensor that is zero small numbers for a while: a fresh adapter lets no gradient through to A."""
    generator = torch.Generator().manual_seed(0)
    zeros = [parameter for parameter in trained.values() if not parameter.any()]
    with torch.no_grad():
        for parameter in zeros:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]) / 16)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def _verdict(
    adapted: AdaptedModel, plain: tuple[Tensor, dict[str, Tensor]], batch: dict[str, Any], run_id: str
) -> Verdict:
    """Return how the fast path, which is in the model, compares with what the plain one computed."""
    try:
        found_loss, found = _losses_and_gradients(adapted, batch)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        return Verdict(run_id, False, f"it fails on this model ({first_line(error)})")
    wanted_loss, wanted = plain
    if wanted.keys() != found.keys():
        [worst, *_] = sorted(wanted.keys() ^ found.keys())
        return Verdict(run_id, False, f"{worst} has a gradient in one and not in the other", worst=worst)
    loss = float((found_loss - wanted_loss).abs() / wanted_loss.abs())
    norms = {name: float(gradient.norm()) for name, gradient in wanted.items()}
    errors = {name: float((found[name] - gradient).norm()) for name, gradient in wanted.items()}
    whole = math.hypot(*norms.values())
    gradient = math.hypot(*errors.values()) / whole
    relative = {name: errors[name] / norm for name, norm in norms.items() if not norm <= NEGLIGIBLE * whole}
    worst = max(relative, key=lambda name: (math.isnan(relative[name]), relative[name]))
    bounds = BOUNDS[adapted.loaded.compute_dtype]
    # "<=" is false for what is not a number
    on = loss <= bounds.loss and gradient <= bounds.gradient and relative[worst] <= bounds.tensor
    problem = (
        ""
        if on
        else (
            f"on this model it computes something else (loss by {loss:.2g}, gradients by {gradient:.2g}, that of {worst} "
            f"by {relative[worst]:.2g} of itself)"
        )
    )
    return Verdict(run_id, on, problem, loss, gradient, relative[worst], worst)
