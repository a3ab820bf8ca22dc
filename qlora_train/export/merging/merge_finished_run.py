"""Merge a finished run: measure the adapter, merge from files, verify the result, and keep it if it is as good."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from qlora_train.adapters import load_trained
from qlora_train.adapters.adapter_folder import read_adapter_settings
from qlora_train.architectures import detect
from qlora_train.data.held_out_rows import RunRows, load_rows
from qlora_train.data.types import Example
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.export.finished_run import FinishedRun, open_finished_run
from qlora_train.export.loading_code import needed_attention
from qlora_train.export.merging.merge_quality import merge_log, merge_results, merge_section
from qlora_train.export.merging.verify import MergeResult, MergeRun, choose_merge_base
from qlora_train.export.model_card import merged_loading, write_card
from qlora_train.export.predictions import Predictions, Reference, compared_rows
from qlora_train.models import load_model
from qlora_train.models.hardware import choose_compute_dtype
from qlora_train.models.loading import auto_class_of, model_config
from qlora_train.models.token_probes import run_probes
from qlora_train.runs import run_lock
from qlora_train.utils.device import free_memory, select_device

logger = logging.getLogger(__name__)


def merge(path: Path, overrides: Sequence[str] = (), *, device: str | None = None) -> MergeResult:
    """Merge the adapter of the finished run at `path`; overrides are `export.key=value`."""
    run = open_finished_run(path, overrides)
    with run_lock(run.folder):
        return merge_run(run, device)


def merge_run(run: FinishedRun, device: str | None = None) -> MergeResult:
    """Merge the adapter of a finished run whose folder is locked, and record the measurements.

    Args:
        device: on which to merge and to check the merged model, None for the GPU if there is one; the adapter is measured
            where it was trained.

    Raises:
        ConfigError: no plain LoRA adapter of this base.
        MergeError: the merge is refused or exceeds a limit.
    """
    folder, config, source = run.folder, run.config, run.source
    read_adapter_settings(folder.adapter, source)
    training = folder.read_results().get("training", {})
    step = training.get("taken_from_step", "unknown (no results.json)")
    logger.debug("merge: adapter of step %s onto %s", step, config.export.merge_base)
    rows = load_rows(folder.rows)
    free_memory()
    reference = _measure_adapter(run, rows)
    free_memory()
    settings = _merge_settings(run, device or str(select_device()))

    def write_merged_card(staging: Path, result: MergeResult) -> None:
        write_card(
            staging,
            base=source.name,
            revision=source.revision,
            config=config,
            metrics={key: float(training[key]) for key in ("train_loss", "eval_loss") if training.get(key) is not None},
            num_train_rows=rows.num_train_rows,
            kind="merged",
            loading=merged_loading(
                staging,
                settings.loading_code(),
                folder.system_prompt(),
                trust_remote_code=config.model.trust_remote_code,
            ),
            merge=merge_section(result),
        )

    result = choose_merge_base(
        settings,
        folder.merged,
        reference=reference,
        export=config.export,
        batch_size=config.train.per_device_eval_batch_size,
        finish=write_merged_card,
    )
    folder.delete_merged_results()
    folder.add_results(merge=merge_results(result))
    for line in merge_log(result):
        logger.info("%s", line)
    logger.info("merged: %s (onto the %s base)", folder.merged, result.report.merge_base)
    return result


def _merge_settings(run: FinishedRun, device: str) -> MergeRun:
    config, source = run.config, run.source
    compute_dtype = choose_compute_dtype(config.quantization.bnb_4bit_compute_dtype, select_device())
    dtype = torch.bfloat16 if compute_dtype == torch.float32 else compute_dtype
    return MergeRun(
        base_folder=source.folder,
        adapter_folder=run.folder.adapter,
        quantization=config.quantization,
        dtype=dtype if source.config.get("quantization_config") else None,
        max_shard_size=config.export.max_shard_size,
        load_dtype=compute_dtype,
        model_config=model_config(source, config.model),
        device=device,
        trust_remote_code=config.model.trust_remote_code,
        auto_class=auto_class_of(source, config.model),
        attention=needed_attention(detect(source.config)),
    )


def _measure_adapter(run: FinishedRun, data: RunRows) -> Reference:
    """Measure the adapter on its base; no reference to the model remains."""
    config = run.config
    loaded = load_model(config.model, config.quantization, source=run.source)
    adapted = load_trained(loaded, run.folder.adapter)
    rows: Sequence[Example] = data.eval
    if not rows:
        logger.debug("merge: checked on training rows (data.eval has none)")
        rows = compared_rows(data.first_rows())
    losses = held_out_loss(
        adapted, rows, batch_size=config.train.per_device_eval_batch_size, pad_token_id=loaded.tokenizer.pad_token_id
    )
    probes = run_probes(loaded.tokenizer, rows, date=run.date)
    return Reference(rows, bool(data.eval), losses, Predictions.of(adapted, compared_rows(rows)), probes)
