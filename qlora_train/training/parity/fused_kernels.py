"""Use fused kernels if a parity check on the first rows matches PEFT and Transformers.

Otherwise, beyond the rounding of the compute dtype, the run warns and keeps the reference. The result is stored in the run
folder, so that a resumed run uses the same kernels.
"""

import logging
from dataclasses import replace
from itertools import islice
from typing import Any

from qlora_train.adapters import AdaptedModel
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.data.collate import PaddingCollator, padding_multiple
from qlora_train.data.streaming import RowStream
from qlora_train.kernels.install import FusedKernels, install
from qlora_train.objectives.sft_loss import label_losses
from qlora_train.runs import RunFolder, read_json
from qlora_train.training.parity.gradients import (
    FAILURES,
    TOLERANCES,
    compare_gradients,
    full_checkpointing,
    gradients_of,
    within_memory,
)
from qlora_train.training.parity.parity_result import ParityResult, load_parity, save_parity
from qlora_train.training.parity.preserve_state import preserve_model_state
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.errors import first_line, is_out_of_memory, nondeterministic_operation

logger = logging.getLogger(__name__)

SIZES = ((4, 128), (2, 128), (1, 128), (1, 32))
"""Most rows of the parity check and most tokens of each; the next size where memory runs out."""


def choose_fused_kernels(
    adapted: AdaptedModel, data: PreparedData, config: RunConfig, run: RunFolder
) -> FusedKernels | None:
    """Install fused kernels if they match the reference; return None if the model keeps the reference.

    Args:
        adapted: the model.
        data: the parity check uses the first training rows.
        config: the run's settings.
        run: stores the result.

    Raises:
        CheckpointError: the stored result cannot be read.
        TrainingError: out of memory on a few tokens.
    """
    if not config.train.fused_kernels:
        logger.info("fast path: off (train.fused_kernels: false)")
        return None
    run_id = run.metadata().get("run_id", "")
    known = load_parity(run.fused_kernels_file, read_json(run.fused_kernels_file), run_id)

    def chosen(num_rows: int, num_tokens: int) -> tuple[ParityResult, FusedKernels | None]:
        rows = min(num_rows, config.train.per_device_train_batch_size)
        batch = first_tokens(adapted, data, rows, num_tokens)
        parity = known or _compare(adapted, batch, run_id)
        return parity, _install(adapted, batch) if parity.on else None

    parity, fast = within_memory("fast path", SIZES, chosen)
    if known is None:
        save_parity(run.fused_kernels_file, parity)
    if fast is None:
        logger.warning(
            "fast path: OFF, training computes as PEFT and Transformers do, and slower: %s; please report this model",
            parity.problem,
        )
        return None
    logger.info("fast path: %s; differs from the plain one by %.1g of the loss and %.1g of the gradients",
                fast.summary(), parity.loss, parity.gradient)  # fmt: skip
    return fast


def _install(adapted: AdaptedModel, batch: dict[str, Any]) -> FusedKernels:
    def run() -> None:
        with preserve_model_state(adapted.model):
            label_losses(adapted.model, **batch)

    return install(adapted.model, run)


def first_tokens(
    adapted: AdaptedModel, data: PreparedData, num_rows: int, num_tokens: int = SIZES[0][1]
) -> dict[str, Any]:
    """Return the beginnings of the first training rows as a padded batch in which every token is a label."""
    rows: Any = data.train.head() if isinstance(data.train, RowStream) else map(data.train.__getitem__, range(num_rows))
    loaded, cut = adapted.loaded, slice(None, num_tokens)
    taken = [
        replace(row, input_ids=row.input_ids[cut], loss_mask=row.loss_mask[cut])
        for row in islice(rows, min(num_rows, data.num_train_rows or num_rows))
    ]
    batch = PaddingCollator(loaded.tokenizer.pad_token_id, padding_multiple(loaded.device))(list(enumerate(taken)))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    return {name: tensor.to(loaded.device) for name, tensor in batch.items() if name != "row"}


def _compare(adapted: AdaptedModel, batch: dict[str, Any], run_id: str) -> ParityResult:
    """Compute the batch with both, under full activation checkpointing; the model keeps the reference."""
    fast: FusedKernels | None = None
    try:
        with full_checkpointing(adapted.loaded.model):
            wanted = gradients_of(adapted, batch)
            fast = _install(adapted, batch)
            found = compare_gradients(wanted, gradients_of(adapted, batch))
    except FAILURES as error:
        if is_out_of_memory(error) or nondeterministic_operation(error):  # says nothing about the model
            raise
        return ParityResult(run_id, False, f"it fails on this model ({first_line(error)})")
    finally:
        if fast is not None:
            fast.uninstall()
    return ParityResult.of(run_id, found, TOLERANCES[adapted.loaded.compute_dtype])
