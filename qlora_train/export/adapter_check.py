"""The adapter that a run has written, loaded as its card says and compared with the model that was trained.

Predictions are compared as those of a merge are: by Kullback-Leibler divergence and first choice. In float32 nothing but
the order of sums lies between the two. In bfloat16 and float16 it is rounding too, which the limit for merges allows for
(`export.max_divergence`).
"""

import datetime
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_train.config import RunConfig
from qlora_train.data import Example
from qlora_train.data.held_out_rows import RunRows
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.export.fresh_process import ReloadCheck, check_in_fresh_process
from qlora_train.export.loading_code import adapter_code
from qlora_train.export.predictions import NUM_LIKELIEST, Predictions, Reference, compared_rows
from qlora_train.models import LoadedModel
from qlora_train.models.token_probes import NUM_ROWS, run_probes
from qlora_train.runs import RunFolder
from qlora_train.utils.atomic_io import STAGING
from qlora_train.utils.errors import ExportError

logger = logging.getLogger(__name__)

NUM_COMPARED_ROWS, MAX_TOKENS = 4, 128
"""Rows on which predictions are compared, and how much of each: the check is to cost seconds."""
MAX_REFERENCE_BYTES = NUM_COMPARED_ROWS * MAX_TOKENS * NUM_LIKELIEST * 8 + 1024 * 1024
"""Of its predictions (an id and a float32 each) and its texts on the disk."""
FLOAT32_LIMIT = 1e-5
"""Nats per token that float32 allows; logits that differ by 2e-3 are 2e-6 apart."""


@dataclass(frozen=True)
class AdapterReference:
    """What the trained model does, in `file`, and the lines that are to load the same model.

    Attributes:
        file: of `Reference.save`; in a folder of its own.
        code: the card's lines, with the paths of this machine.
        compute_dtype: of the run.
        num_texts: that are tokenised.
    """

    file: Path
    code: str
    compute_dtype: torch.dtype
    num_texts: int


def measure_adapter(
    run: RunFolder, config: RunConfig, data: RunRows, model: Any, loaded: LoadedModel, date: datetime.date
) -> AdapterReference:
    """Write what a trained model does on a few short rows into the run folder.

    Args:
        run: its adapter is written already.
        config: the run's settings.
        data: gives the rows.
        model: the base with its adapter.
        loaded: the base as the run loaded it.
        date: that the run renders dated chat templates for.
    """
    rows = _first_rows(data)
    probes = run_probes(loaded.tokenizer, rows, date=date)
    short = sorted((_beginning(row) for row in rows[:NUM_COMPARED_ROWS]), key=lambda row: len(row.input_ids))
    losses = held_out_loss(
        model,
        short,
        batch_size=config.train.per_device_eval_batch_size,
        pad_token_id=loaded.tokenizer.pad_token_id,
    )
    reference = Reference(short, bool(data.eval), losses, Predictions.of(model, compared_rows(short)), probes)
    folder = run.path / f".adapter-check{STAGING}"
    shutil.rmtree(folder, ignore_errors=True)  # a run that was killed may have left it
    folder.mkdir()
    reference.save(folder / "reference.safetensors")
    code = adapter_code(loaded, config, _path_of_base(loaded, config), str(run.adapter.resolve()))
    return AdapterReference(folder / "reference.safetensors", code, loaded.compute_dtype, len(probes))


def check_adapter(run: RunFolder, config: RunConfig, reference: AdapterReference) -> None:
    """Load the adapter in a fresh process as its card says, compare it with the trained model, and record the result.

    Raises:
        ExportError: it cannot be loaded, its tokenizer makes other tokens, or its predictions are beyond rounding.
    """
    try:
        check = check_in_fresh_process(
            run.adapter,
            reference.code,
            reference.file,
            batch_size=config.train.per_device_eval_batch_size,
            error=ExportError,
        )
    finally:
        shutil.rmtree(reference.file.parent, ignore_errors=True)
    limit = FLOAT32_LIMIT if reference.compute_dtype == torch.float32 else config.export.max_divergence
    dtype = str(reference.compute_dtype).removeprefix("torch.")
    found = check.divergence
    problem = _problem(check, limit, dtype)
    run.add_results(
        adapter_check={
            "passed": problem is None,
            "kl_divergence": found.kl,
            "max_divergence": limit,
            "max_difference": found.max_difference,
            "top1_agreement": found.top1_agreement,
            "num_tokens": found.num_tokens,
            "num_texts": reference.num_texts,
            "token_differences": check.token_differences,
        }
    )
    if problem is not None:
        raise ExportError(
            f"{run.adapter}: loaded as its card says, it is not the model that was trained: {problem}; the adapter is "
            "kept, and chat, eval and merge load it as the run did"
        )
    logger.info(
        "adapter check: loaded as its card says: %d texts, the same tokens; KL %.2g nats/token (limit %g, %s), max "
        "difference %.2g, top-1 equal at %.1f %% of %d tokens",
        reference.num_texts, found.kl, limit, dtype, found.max_difference, 100 * found.top1_agreement,
        found.num_tokens,
    )  # fmt: skip


def _problem(check: ReloadCheck, limit: float, dtype: str) -> str | None:
    if check.token_differences:
        return f"its tokenizer makes other tokens than the run trained on: {check.token_differences[0]}"
    found = check.divergence
    if found.kl <= limit:  # false for what is not a number
        return None
    return (
        f"its predictions are {found.kl:.2g} nats/token (KL) from the run's, where {dtype} allows {limit:g}; the "
        f"first choice is the same at {100 * found.top1_agreement:.1f} % of {found.num_tokens} tokens"
    )


def _first_rows(data: RunRows) -> Sequence[Example]:
    """Return the first rows that are held out, else that are trained on."""
    return list(islice(data.eval or data.first_rows(), NUM_ROWS))


def _beginning(row: Example) -> Example:
    """Return the beginning of a row with every token a label: what it predicts of prompts counts as well."""
    ids = np.asarray(row.input_ids, dtype=np.int32)[:MAX_TOKENS]
    return replace(row, input_ids=ids, loss_mask=np.ones(len(ids), dtype=np.bool_))


def _path_of_base(loaded: LoadedModel, config: RunConfig) -> str:
    """Return where the base is on this machine: what the config names, or the snapshot of a Hub repository."""
    local = Path(config.model.model_name_or_path).expanduser()
    return str(local.resolve() if local.exists() else loaded.source.folder)
