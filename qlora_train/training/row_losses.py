"""Losses of single rows after training: a high loss on a trained row is often a wrong label.

A sample of the trained rows and of the held-out rows is measured once, without gradients: a forward pass over at most a
tenth of the tokens that were trained, about 3 % of the time of training.
"""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from qlora_train.data.decoded_rows import DecodedRow, decode_rows
from qlora_train.data.types import Example
from qlora_train.kernels.fsdp_units import is_sharded
from qlora_train.parallel import context
from qlora_train.runs import write_json
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.utils.errors import UserError, first_line
from qlora_train.utils.visible_text import shortened

logger = logging.getLogger(__name__)

TRAIN_SHARE, EVAL_SHARE = 0.1, 0.05
"""Tokens that are measured, as a share of the tokens that were trained."""
MIN_ROWS = 64
NUM_DECODED, MAX_CHARACTERS = 20, 2000
"""Rows with the highest losses, whose text is recorded, and characters of each part."""


def record_row_losses(trainer: QloraTrainer, step: int) -> None:
    """Write row_losses.json for the adapter of `step`, or remove it; every rank calls it.

    A failure is a warning, except where other ranks would wait for this one.

    Raises:
        ModelError: out of memory with a sharded base.
        Stop: a signal asked the process to stop.
    """
    file, limit = trainer.run.row_losses_file, trainer.config.run.row_losses
    if context().is_main:
        file.unlink(missing_ok=True)
    if not limit:
        return
    num_tokens = int(trainer.state.num_input_tokens_seen)
    trained = trainer.batch_source.trained_rows(trainer.state.global_step)
    parts = {
        "train": (trained, TRAIN_SHARE * num_tokens),
        "eval": (trainer.examples.eval, EVAL_SHARE * num_tokens),
    }
    try:
        measured = {
            name: _measured(trainer, _sample(rows, limit, max_tokens, trainer.config.run.seed), len(rows))
            for name, (rows, max_tokens) in parts.items()
            if len(rows)
        }
    except Exception as error:
        met_by_all_ranks = isinstance(error, UserError) and not is_sharded(trainer.model)
        if context().world_size > 1 and not met_by_all_ranks:
            raise
        logger.warning("row losses: not measured (%s)", first_line(error))
        logger.debug("row losses: not measured", exc_info=True)
        return
    if context().is_main:
        try:
            write_json(file, {"step": step, **measured})
        except OSError as error:
            logger.warning("row losses: not written (%s)", error.strerror)


def _sample(rows: Sequence[Example], limit: int, max_tokens: float, seed: int) -> list[Example]:
    """Return at most `limit` rows with at most `max_tokens` tokens, or MIN_ROWS of them: the same on every rank."""
    order = np.random.default_rng(seed).permutation(len(rows))[:limit]
    chosen = [rows[int(index)] for index in order]
    totals = accumulate(example.num_tokens for example in chosen)
    return [
        row for i, (row, total) in enumerate(zip(chosen, totals, strict=True)) if i < MIN_ROWS or total <= max_tokens
    ]


def _measured(trainer: QloraTrainer, rows: Sequence[Example], num_rows: int) -> dict[str, Any]:
    """Measure rows of the `num_rows` that they were drawn from; return what the file records, the highest loss first."""
    tokenizer, train = trainer.adapted.loaded.tokenizer, trainer.config.train
    batch_size = train.per_device_eval_batch_size
    if is_sharded(trainer.model):  # cannot retry with fewer rows; these fitted, with their gradients
        batch_size = min(batch_size, train.per_device_train_batch_size)
    with trainer.accelerator.autocast():  # as inside the training loop
        losses = trainer.objective.row_losses(
            trainer.model, rows, batch_size=batch_size, pad_token_id=tokenizer.pad_token_id
        )
    ranked = sorted(zip(losses, rows, strict=True), key=lambda each: -each[0])
    return {
        "num_rows": num_rows,
        "num_measured": len(rows),
        "median": statistics.median(losses),
        "rows": [
            {"where": row.where, "loss": loss, "sequences": [_shown(each) for each in decode_rows([row], tokenizer)]}
            for loss, row in ranked[:NUM_DECODED]
        ],
        "other_rows": [{"where": row.where, "loss": loss} for loss, row in ranked[NUM_DECODED:]],
    }


def _shown(row: DecodedRow) -> dict[str, Any]:
    """Return a row as JSON, its long parts shortened."""
    return replace(
        row, segments=tuple((shortened(text, MAX_CHARACTERS), trained) for text, trained in row.segments)
    ).to_json()
