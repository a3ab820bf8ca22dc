"""Forward products with the frozen base in float8, where a run asks for them: never without saying what they change."""

import logging

from qlora_train.adapter import AdaptedModel
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.errors import TrainingError
from qlora_train.kernels.fast_path import FastPath
from qlora_train.kernels.float8 import why_not_on
from qlora_train.trainer.fast_path import first_tokens
from qlora_train.trainer.gradients import Bounds, difference, gradients_of

logger = logging.getLogger(__name__)

BOUNDS = Bounds(loss=0.2, gradient=1.0, tensor=4.0)
"""Largest differences from bfloat16 that a run trains with. Rounding changes each product by 0.04 of itself; through the 30
layers of a model of 135 million parameters that is 0.03 of the loss and 0.4 of the gradients."""
MUCH = 0.01
"""Change of the loss, as a share of it, that is a warning."""


def use_float8(fast: FastPath | None, adapted: AdaptedModel, data: PreparedData, config: RunConfig) -> None:
    """Let the forward pass multiply in float8, and say what that does to the loss and the gradients of the first rows.

    Args:
        fast: what is in the model; None where it stays plain.
        adapted: the model.
        data: the comparison takes its text from the first training rows.
        config: the run's settings.

    Raises:
        TrainingError: the model or the device has no such products, or they change too much.
    """
    device = adapted.loaded.device
    if fast is None:
        raise TrainingError("train.fp8: this model is not on the fast path, for the reason above; set it to false")
    weights = [weight for weight in fast.weights if weight.has_float8]
    if not weights:
        raise TrainingError(
            "train.fp8: no adapted layer of this model computes in bfloat16 with sizes that are multiples of 16; set it to "
            "false, or quantization.bnb_4bit_compute_dtype to bfloat16"
        )
    problem = why_not_on(device)
    if problem:
        raise TrainingError(
            f"train.fp8: {device} does not multiply float8 with a scale for each row ({problem}); set it to false"
        )
    batch = first_tokens(adapted, data, config.train.per_device_train_batch_size)
    wanted = gradients_of(adapted, batch)
    for weight in weights:
        weight.multiplies_in_float8 = True
    found = gradients_of(adapted, batch)
    differs = difference(wanted, found)
    if not BOUNDS.hold(differs):
        raise TrainingError(
            f"train.fp8: {differs.said()}; allowed: {BOUNDS.loss:g}, {BOUNDS.gradient:g} and {BOUNDS.tensor:g}; set it to "
            "false"
        )
    logger.log(
        logging.WARNING if differs.loss > MUCH else logging.INFO,
        "fp8: forward products of %d of %d adapted layers; loss of the first rows %.4f instead of %.4f (by %.2g %%), "
        "gradients differ by %.2g %%%s",
        len(weights), len(fast.weights), found.loss, wanted.loss, 100 * differs.loss, 100 * differs.gradient,
        "; that is much: compare eval_loss with a run without train.fp8" if differs.loss > MUCH else "",
    )  # fmt: skip
