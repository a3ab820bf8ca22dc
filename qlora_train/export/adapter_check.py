"""Check a written adapter: load it by the code on its card in a fresh process and compare it with the trained model.

In float32 the two differ only by the order of sums. In bfloat16 and float16 they also differ by rounding, which
`export.max_divergence`, the limit for merges, allows for.
"""

import datetime
import logging
import shutil
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_train.adapters import load_trained
from qlora_train.config import RunConfig
from qlora_train.data import Example
from qlora_train.data.held_out_rows import RunRows, load_rows
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.export.check_sizes import MAX_TOKENS, NUM_COMPARED_ROWS
from qlora_train.export.finished_run import FinishedRun
from qlora_train.export.fresh_process import ReloadCheck, check_in_fresh_process
from qlora_train.export.loading_code import adapter_code
from qlora_train.export.predictions import Predictions, Reference, compared_rows
from qlora_train.models import LoadedModel, load_model
from qlora_train.models.token_probes import NUM_ROWS, run_probes
from qlora_train.parallel import context
from qlora_train.runs import RunFolder
from qlora_train.utils.atomic_io import STAGING
from qlora_train.utils.device import free_memory
from qlora_train.utils.errors import ExportError

logger = logging.getLogger(__name__)

FLOAT32_LIMIT = 1e-5
"""KL divergence in nats per token; logits that differ by 2e-3 give 2e-6."""


@dataclass(frozen=True)
class AdapterReference:
    """Measurements of the trained model in `file` (see `Reference.save`), and the code that must load the same model."""

    file: Path
    code: str
    compute_dtype: torch.dtype
    num_texts: int


def measure_adapter(
    run: RunFolder, config: RunConfig, data: RunRows, model: Any, loaded: LoadedModel, date: datetime.date
) -> AdapterReference:
    """Measure the trained model on a few short rows, after its adapter is written; every rank of a sharded base calls it.

    Args:
        date: for dated chat templates.
    """
    rows = list(islice(data.eval or data.first_rows(), NUM_ROWS))
    probes = run_probes(loaded.tokenizer, rows, date=date)
    short = sorted((_shortened(row) for row in rows[:NUM_COMPARED_ROWS]), key=lambda row: len(row.input_ids))
    losses = held_out_loss(
        model, short, batch_size=config.train.per_device_eval_batch_size, pad_token_id=loaded.tokenizer.pad_token_id
    )
    reference = Reference(short, bool(data.eval), losses, Predictions.of(model, compared_rows(short)), probes)
    folder = run.path / f".adapter-check{STAGING}"
    if context().is_main:
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
        folder.mkdir()
        reference.save(folder / "reference.safetensors")
    local = Path(config.model.model_name_or_path).expanduser()
    base = str(local.resolve() if local.exists() else loaded.source.folder)
    code = adapter_code(loaded, config, base, str(run.adapter.resolve()))
    return AdapterReference(folder / "reference.safetensors", code, loaded.compute_dtype, len(probes))


def measure_again(run: FinishedRun) -> AdapterReference:
    """Measure the adapter of a run that ended before its adapter was checked."""
    loaded = load_model(run.config.model, run.config.quantization, source=run.source)
    model = load_trained(loaded, run.folder.adapter)
    return measure_adapter(run.folder, run.config, load_rows(run.folder.rows), model, loaded, run.date)


def check_adapter(run: FinishedRun, reference: AdapterReference) -> None:
    """Load the adapter in a fresh process, compare it with the trained model, and record the result.

    Raises:
        ExportError: it cannot be loaded, its tokenizer differs, or its predictions differ by more than rounding.
    """
    folder, config = run.folder, run.config
    free_memory()
    try:
        check = check_in_fresh_process(
            folder.adapter,
            reference.code,
            reference.file,
            batch_size=config.train.per_device_eval_batch_size,
            error=ExportError,
        )
    finally:
        shutil.rmtree(reference.file.parent, ignore_errors=True)
    limit = FLOAT32_LIMIT if reference.compute_dtype == torch.float32 else config.export.max_divergence
    dtype = str(reference.compute_dtype).removeprefix("torch.")
    divergence, problem = check.divergence, _problem(check, limit, dtype)
    folder.add_results(
        adapter_check={
            "passed": problem is None,
            "kl_divergence": divergence.kl,
            "max_divergence": limit,
            "max_difference": divergence.max_difference,
            "top1_agreement": divergence.top1_agreement,
            "num_tokens": divergence.num_tokens,
            "num_texts": reference.num_texts,
            "token_differences": check.token_differences,
        }
    )
    if problem is not None:
        raise ExportError(
            f"{folder.adapter}: the code on its card does not load the trained model: {problem}; the adapter is kept, and "
            "chat, eval and merge load it as the run did"
        )
    logger.info(
        "adapter check: passed (KL %.2g nats/token, limit %g for %s; top-1 equal at %.1f %%)",
        divergence.kl, limit, dtype, 100 * divergence.top1_agreement,
    )  # fmt: skip


def _problem(check: ReloadCheck, limit: float, dtype: str) -> str | None:
    if check.token_differences:
        return f"its tokenizer encodes text differently than the run's: {check.token_differences[0]}"
    divergence = check.divergence
    if divergence.kl <= limit:  # False for NaN
        return None
    return (
        f"KL divergence {divergence.kl:.2g} nats/token, allowed in {dtype}: {limit:g}; top-1 equal at "
        f"{100 * divergence.top1_agreement:.1f} % of {divergence.num_tokens} tokens"
    )


def _shortened(row: Example) -> Example:
    """Return the first tokens of a row, all of them labels: predictions inside prompts count too."""
    ids = np.asarray(row.input_ids, dtype=np.int32)[:MAX_TOKENS]
    return replace(row, input_ids=ids, loss_mask=np.ones(len(ids), dtype=np.bool_))
