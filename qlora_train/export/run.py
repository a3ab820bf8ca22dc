"""Merge a finished run: measure the adapter, merge from files, measure the result, keep it only when it is as good."""

import logging
from importlib.metadata import version
from pathlib import Path

import torch

from qlora_train.adapter import load_trained
from qlora_train.adapter.settings import read_settings
from qlora_train.checkpoint import RunFolder
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.device import free_memory, select_device
from qlora_train.evaluate import HeldOutLoss, held_out_loss
from qlora_train.export.card import write_card
from qlora_train.export.verify import MergeChoice, MergeRun, choose_merge_base
from qlora_train.loader import BaseSource, load_model
from qlora_train.loader.hardware import choose_compute_dtype
from qlora_train.loader.model import model_config

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide a run's numbers."""
    return {name: version(name) for name in LIBRARIES}


def merge_run(folder: RunFolder, config: RunConfig, source: BaseSource, data: PreparedData) -> MergeChoice:
    """Merge a finished run's adapter into `folder.merged` and record what was measured.

    Args:
        folder: a finished run.
        config: its settings.
        source: its base model, with weights.
        data: its rows; the held-out ones are measured.

    Raises:
        ConfigError: the adapter is not a plain LoRA adapter of this base.
        MergeError: the merge cannot be done exactly, or its loss exceeds the adapter's by more than the config allows.
    """
    read_settings(folder.adapter, source)
    step = folder.read_results().get("training", {}).get("taken_from_step", "unknown (results.json is gone)")
    logger.info("merge: adapter of step %s onto %s", step, config.export.merge_base)
    adapter_loss = _adapter_loss(folder, config, source, data) if data.eval else None
    free_memory()

    def write_merged_card(staging: Path, choice: MergeChoice) -> None:
        write_card(
            staging,
            base=source.name,
            revision=source.revision,
            config=config,
            metrics=_measured(adapter_loss, choice),
            num_train_rows=data.num_train_rows,
            library_versions=library_versions(),
            kind="merged",
        )

    choice = choose_merge_base(
        _merge_run(folder, config, source),
        folder.merged,
        merge_base=config.export.merge_base,
        examples=data.eval,
        adapter_loss=adapter_loss,
        max_loss_increase=config.export.max_loss_increase,
        batch_size=config.train.per_device_eval_batch_size,
        finish=write_merged_card,
    )
    measured = _measured(adapter_loss, choice)
    folder.add_results(merge={"kept": choice.report.merge_base, **measured})
    for name, loss in measured.items():
        logger.info("held-out %s: %.4f nats/token", name, loss)
    logger.info("merged: %s (onto the %s base)", folder.merged, choice.report.merge_base)
    return choice


def _merge_run(folder: RunFolder, config: RunConfig, source: BaseSource) -> MergeRun:
    device = select_device()
    compute_dtype = choose_compute_dtype(config.quantization.bnb_4bit_compute_dtype, device)
    return MergeRun(
        base_folder=source.folder,
        adapter_folder=folder.adapter,
        quantization=config.quantization,
        dtype=torch.bfloat16 if compute_dtype == torch.float32 else compute_dtype,
        max_shard_size=config.export.max_shard_size,
        load_dtype=compute_dtype,
        model_config=model_config(source, config.model),
        device=str(device),
        trust_remote_code=config.model.trust_remote_code,
    )


def _adapter_loss(folder: RunFolder, config: RunConfig, source: BaseSource, data: PreparedData) -> HeldOutLoss:
    """Return the loss of the adapter on its 4-bit base; nothing refers to the model afterwards."""
    loaded = load_model(config.model, config.quantization, source=source)
    return held_out_loss(
        load_trained(loaded, folder.adapter),
        data.eval,
        batch_size=config.train.per_device_eval_batch_size,
        pad_token_id=loaded.tokenizer.pad_token_id,
    )


def _measured(adapter_loss: HeldOutLoss | None, choice: MergeChoice) -> dict[str, float]:
    """Return the held-out losses by what was measured, in nats a token."""
    of_adapter = {} if adapter_loss is None else {"loss with adapter": adapter_loss.loss}
    return of_adapter | {f"loss merged onto {kind}": loss for kind, loss in choice.losses.items()}
