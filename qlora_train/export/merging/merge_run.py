"""Merge a finished run: measure the adapter, merge from files, verify the result, and keep it if it is as good."""

import datetime
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from qlora_train.adapters import load_trained
from qlora_train.adapters.adapter_folder import read_adapter_settings
from qlora_train.architectures import detect
from qlora_train.config import RunConfig
from qlora_train.data.held_out_rows import RunRows
from qlora_train.data.types import Example
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.export.loading_code import needed_attention
from qlora_train.export.merging.merge_quality import merge_log, merge_results, merge_section
from qlora_train.export.merging.verify import MergeResult, MergeRun, choose_merge_base
from qlora_train.export.model_card import merged_loading, write_card
from qlora_train.export.predictions import Predictions, Reference, compared_rows
from qlora_train.models import BaseSource, load_model
from qlora_train.models.hardware import choose_compute_dtype
from qlora_train.models.loading import auto_class_of, model_config
from qlora_train.models.token_probes import run_probes
from qlora_train.runs import RunFolder
from qlora_train.utils.device import free_memory, select_device

logger = logging.getLogger(__name__)


def merge_run(
    folder: RunFolder, config: RunConfig, source: BaseSource, data: RunRows, date: datetime.date, device: str
) -> MergeResult:
    """Merge a finished run's adapter into `folder.merged` and record the measurements.

    Args:
        date: for dated chat templates.
        device: on which to merge and to check the merged model; the adapter is measured where it was trained.

    Raises:
        ConfigError: no plain LoRA adapter of this base.
        MergeError: the merge is refused or exceeds a limit.
    """
    read_adapter_settings(folder.adapter, source)
    training = folder.read_results().get("training", {})
    step = training.get("taken_from_step", "unknown (no results.json)")
    logger.info("merge: adapter of step %s onto %s", step, config.export.merge_base)
    reference = _measure_adapter(folder, config, source, data, date)
    free_memory()
    run = _merge_settings(folder, config, source, device)

    def write_merged_card(staging: Path, result: MergeResult) -> None:
        write_card(
            staging,
            base=source.name,
            revision=source.revision,
            config=config,
            metrics={key: float(training[key]) for key in ("train_loss", "eval_loss") if training.get(key) is not None},
            num_train_rows=data.num_train_rows,
            kind="merged",
            loading=merged_loading(
                staging, run.loading_code(), folder.system_prompt(), trust_remote_code=config.model.trust_remote_code
            ),
            merge=merge_section(result),
        )

    result = choose_merge_base(
        run,
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


def _merge_settings(folder: RunFolder, config: RunConfig, source: BaseSource, device: str) -> MergeRun:
    compute_dtype = choose_compute_dtype(config.quantization.bnb_4bit_compute_dtype, select_device())
    dtype = torch.bfloat16 if compute_dtype == torch.float32 else compute_dtype
    return MergeRun(
        base_folder=source.folder,
        adapter_folder=folder.adapter,
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


def _measure_adapter(
    folder: RunFolder, config: RunConfig, source: BaseSource, data: RunRows, date: datetime.date
) -> Reference:
    """Measure the adapter on its base; no reference to the model remains."""
    loaded = load_model(config.model, config.quantization, source=source)
    adapted = load_trained(loaded, folder.adapter)
    rows: Sequence[Example] = data.eval
    if not rows:
        logger.info("merge: checked on training rows (data.eval has none)")
        rows = compared_rows(data.first_rows())
    losses = held_out_loss(
        adapted, rows, batch_size=config.train.per_device_eval_batch_size, pad_token_id=loaded.tokenizer.pad_token_id
    )
    probes = run_probes(loaded.tokenizer, rows, date=date)
    return Reference(rows, bool(data.eval), losses, Predictions.of(adapted, compared_rows(rows)), probes)
