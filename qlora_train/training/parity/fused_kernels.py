"""Use fused kernels if a parity check on the first rows matches PEFT and Transformers; else warn and keep the reference."""

import logging
from dataclasses import replace
from itertools import islice
from typing import Any

from qlora_train.adapters import AdaptedModel
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.data.collate import PaddingCollator, padding_multiple
from qlora_train.kernels.install import FusedKernels, install
from qlora_train.objectives.label_losses import label_losses
from qlora_train.runs import RunFolder
from qlora_train.training.parity.gradients import TOLERANCES, Gradients, gradients_of
from qlora_train.training.parity.parity_check import check_parity, load_parity, save_parity, with_fitting_size
from qlora_train.training.parity.preserve_state import preserve_model_state
from qlora_train.utils.constants import IGNORE_INDEX

logger = logging.getLogger(__name__)

NAME = "fused kernels"
SIZES = ((4, 128), (2, 128), (1, 128), (1, 32))


def choose_fused_kernels(
    adapted: AdaptedModel, data: PreparedData, config: RunConfig, run: RunFolder
) -> FusedKernels | None:
    """Install fused kernels if they match the reference; return None if the model keeps the reference.

    Args:
        data: the parity check uses the first training rows.

    Raises:
        CheckpointError: the stored result cannot be read.
        TrainingError: out of memory on a few tokens.
    """
    if not config.train.fused_kernels:
        logger.info("fused kernels: off (train.fused_kernels: false)")
        return None
    tolerances = TOLERANCES[adapted.loaded.compute_dtype]
    max_rows = config.train.per_device_train_batch_size

    def batch(num_rows: int, num_tokens: int) -> dict[str, Any]:
        return first_tokens(adapted, data, min(num_rows, max_rows), num_tokens)

    run_id = run.metadata().get("run_id", "")
    parity = load_parity(run.fused_kernels_file, run_id)
    if parity is None:
        parity = check_parity(
            NAME, adapted, run_id, SIZES, lambda *size: both_gradients(adapted, batch(*size)),
            tolerances,
        )  # fmt: skip
        save_parity(run.fused_kernels_file, parity)
    if not parity.passed:
        logger.warning("fused kernels: off (%s); training is slower; please report this model", parity.problem)
        return None
    fused = with_fitting_size(NAME, adapted, SIZES, lambda *size: _install(adapted, batch(*size)))
    logger.info(
        "fused kernels: on (max difference: loss %.1g, limit %g; gradients %.1g, limit %g)",
        parity.loss, tolerances.loss, parity.gradient, tolerances.gradient,
    )  # fmt: skip
    logger.debug("fused kernels: %s", fused.summary())
    return fused


def _install(adapted: AdaptedModel, batch: dict[str, Any]) -> FusedKernels:
    def forward() -> None:
        with preserve_model_state(adapted.model):
            label_losses(adapted.model, **batch)

    return install(adapted.model, forward)


def both_gradients(adapted: AdaptedModel, batch: dict[str, Any]) -> tuple[Gradients, Gradients]:
    """Return the gradients of the reference and of fused kernels; the model keeps the reference."""
    expected = gradients_of(adapted, batch)
    fused = _install(adapted, batch)
    try:
        return expected, gradients_of(adapted, batch)
    finally:
        fused.uninstall()


def first_tokens(adapted: AdaptedModel, data: PreparedData, num_rows: int, num_tokens: int) -> dict[str, Any]:
    """Return the first tokens of the first training rows as a padded batch with a label at every token."""
    loaded, cut = adapted.loaded, slice(None, num_tokens)
    examples = [
        replace(row, input_ids=row.input_ids[cut], loss_mask=row.loss_mask[cut], rejected=None)
        for row in islice(data.first_rows(), min(num_rows, data.num_train_rows or num_rows))
    ]
    batch = PaddingCollator(loaded.tokenizer.pad_token_id, padding_multiple(loaded.device))(list(enumerate(examples)))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    return {name: tensor.to(loaded.device) for name, tensor in batch.items() if name != "row"}
