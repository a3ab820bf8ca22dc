"""A run from config to adapter and merged model: the table of contents."""

import datetime
import json
import logging
import platform
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora_train.adapters import AdaptedModel, attach_adapter, load_trained
from qlora_train.architectures import check_target_modules, detect
from qlora_train.config import RunConfig, load_config
from qlora_train.config.preflight import check_machine
from qlora_train.data import PreparedData
from qlora_train.data.batch_order import epoch_order
from qlora_train.data.collate import PaddingCollator, batches_with_labels, padding_multiple
from qlora_train.data.held_out_rows import RunRows, load_rows, save_rows
from qlora_train.data.token_store import Rows
from qlora_train.export.adapter_check import AdapterReference, check_adapter, measure_adapter
from qlora_train.export.export_formats import EXPORT_FORMATS, ExportRequest
from qlora_train.export.gguf.converter import find_converter
from qlora_train.export.hub_upload import Upload, plan_upload
from qlora_train.export.merging.merge import check_mergeable
from qlora_train.export.merging.merge_run import library_versions, merge_run
from qlora_train.export.model_card import adapter_loading, clean_adapter_config, write_card
from qlora_train.inference.eval_report import EvalSettings, evaluate_run
from qlora_train.inference.finished_run import finished_config, start_date, with_pinned_revision
from qlora_train.models import BaseSource, LoadedModel, load_model, resolve_base
from qlora_train.models.tokenizer import check_can_be_saved, save_tokenizer
from qlora_train.planning.disk import check_disk_space, plan_disk
from qlora_train.planning.inspect_data import prepare_tokenizer_and_data
from qlora_train.runs import (
    RunFolder,
    changed_settings,
    check_same_metadata,
    check_same_settings,
    open_run,
    record_metadata,
    run_lock,
)
from qlora_train.training import train
from qlora_train.training.optimizer import choose_optimizer
from qlora_train.utils import atomic_io, signals
from qlora_train.utils.device import deterministic_algorithms, free_memory, select_device
from qlora_train.utils.errors import ExportError

logger = logging.getLogger(__name__)

NUM_INITIAL_BATCHES = 64
"""Batches that a data-driven initialisation sees; it goes through them until it has converged."""


def run(config: RunConfig, *, resume: str = "auto") -> RunFolder:
    """Do what a config says, or what is left of it.

    Args:
        config: the resolved config; `run.output_dir` is set.
        resume: `auto`, `never` or the path of a checkpoint.

    Returns:
        The finished run.

    Raises:
        UserError: anything the user can fix; whatever was whole before is still whole.
        Stop: the process was asked to stop; the same call goes on from there.
    """
    device = select_device()
    with (
        signals.time_limit(config.run.max_minutes),
        deterministic_algorithms(config.run.deterministic),
        open_run(config, resume=resume) as (folder, checkpoint),
    ):
        reference = None
        if folder.is_finished() and not changed_settings(folder, config):
            logger.info("%s: training has finished already; delete the folder to train again", folder.path)
        else:
            if device.type == "cpu" and "num_threads" not in config.run.allow_changed:
                keep_num_threads(folder)
            check_machine(config)
            source, data = prepare(config, folder)
            record_metadata(folder, config, facts(config, source, data, device, start_date(folder)))
            if doomed := folder.existing_results():
                names = ", ".join(path.name for path in doomed)
                logger.warning("%s: training further will replace the adapter and delete %s", folder.path, names)
            data.report.log()
            atomic_io.write_text(folder.data_report_file, json.dumps(data.report.to_json(), indent=2) + "\n")
            save_rows(folder.rows, data, data.fingerprint)
            reference = train_adapter(folder, config, source, data, checkpoint)
        if not folder.read_results().get("adapter_check", {}).get("passed"):
            reference = reference or measure_again(folder, config)
            free_memory()
            check_adapter(folder, config, reference)
        if config.export.merge and folder.has_merged():
            logger.info("%s is there already; delete it to merge again", folder.merged)
        elif config.export.merge:
            _merge(folder, config)
    return folder


def train_adapter(
    folder: RunFolder, config: RunConfig, source: BaseSource, data: PreparedData, checkpoint: Path | None
) -> AdapterReference:
    """Load the base, train an adapter on it, write and measure it; the model is gone from memory afterwards."""
    loaded = load_model(config.model, config.quantization, source=source)
    # a checkpoint replaces the initial weights, so that a resumed run need not compute them
    batches = [] if checkpoint else initial_batches(config, data, loaded)
    adapted = attach_adapter(loaded, config.lora, seed=config.run.seed, batches=batches)
    if checkpoint:
        folder.delete_checkpoints_after(checkpoint)
    optim = choose_optimizer(config.train.optim, adapted, checkpoint)
    settled = config.model_copy(update={"train": config.train.model_copy(update={"optim": optim})})
    need = plan_disk(folder, adapted, settled, data, checkpoint)
    check_disk_space(folder, need, shutil.disk_usage(folder.path).free)
    logger.info("training: %s", f"resumes from {checkpoint}" if checkpoint else "starts")
    result = train(adapted, data, settled, folder, checkpoint)
    write_adapter(folder, adapted, config, data, result)
    return measure_adapter(folder, config, data, adapted.model, adapted.loaded, start_date(folder))


def measure_again(folder: RunFolder, config: RunConfig) -> AdapterReference:
    """Measure the adapter of a run that ended before its adapter was checked."""
    source, data = prepare_again(config, folder)
    config = finished_config(config, folder)
    loaded = load_model(config.model, config.quantization, source=source)
    return measure_adapter(folder, config, data, load_trained(loaded, folder.adapter), loaded, start_date(folder))


def merge(folder: RunFolder, config: RunConfig, *, device: str | None = None) -> None:
    """Merge a finished run; `config` may differ from the run's in its export section. `device` is `merge_run`'s."""
    check_same_settings(folder, config)
    with run_lock(folder):
        _merge(folder, config, device)


def _merge(folder: RunFolder, config: RunConfig, device: str | None = None) -> None:
    free_memory()
    merge_run(
        folder, finished_config(config, folder), *prepare_again(config, folder), start_date(folder),
        device or str(select_device()),
    )  # fmt: skip


def export(folder: RunFolder, *, format_name: str, quant: str | None = None, llama_cpp: Path | None = None) -> Path:
    """Write a finished run in a format of `EXPORT_FORMATS` and return its folder; merges first where the format needs it.

    Args:
        folder: the run.
        format_name: the format.
        quant: number format of a GGUF file; None for the default.
        llama_cpp: a checkout of llama.cpp; None for the installed package.
    """
    export_format = EXPORT_FORMATS[format_name]
    quant = export_format.choose_quant(quant)
    if export_format.quants:
        find_converter(llama_cpp)  # before a merge that takes long
    config = load_config(folder.config_file)
    with run_lock(folder):
        source = None
        if export_format.needs != "merged model":
            source = _same_base(folder, config, weights=export_format.needs == "base weights")
        elif not folder.has_merged():
            logger.info("%s: missing or damaged (merging first)", folder.merged)
            _merge(folder, config)
        return export_format.write(ExportRequest(folder, config, source, quant, llama_cpp))


def planned_upload(folder: RunFolder, repo: str, *, what: str, private: bool) -> Upload:
    """Look at what a finished run would send to the Hub.

    Args:
        folder: the run.
        repo: `owner/name`.
        what: `adapter` or `merged`.
        private: whether a repository that is made anew is private.

    Raises:
        ExportError: there is no merged model, or something in the folder must not be sent.
    """
    if what == "merged" and not folder.has_merged():
        raise ExportError(f"{folder.merged}: not there, or damaged; make it with: qlora-train merge {folder.path}")
    return plan_upload(folder.merged if what == "merged" else folder.adapter, repo, private=private)


def _same_base(folder: RunFolder, config: RunConfig, *, weights: bool) -> BaseSource:
    """Return the base of a finished run, which must be the one that it was trained on."""
    source = resolve_base(with_pinned_revision(config.model, folder), weights=weights)
    check_same_metadata(folder, {"base_identity": source.identity()})
    return source


def evaluate(folder: RunFolder, settings: EvalSettings) -> dict[str, Any]:
    """Measure base, adapter and merged model of a finished run on its held-out rows."""
    config = load_config(folder.config_file)
    with run_lock(folder):
        config = finished_config(config, folder)
        source, rows = prepare_again(config, folder)
        return evaluate_run(folder, config, source, rows, replace(settings, date=start_date(folder)))


def keep_num_threads(folder: RunFolder) -> None:
    """Compute with as many threads as the run began with: how sums are split decides how they are rounded."""
    recorded = folder.metadata().get("num_threads")
    if recorded not in (None, torch.get_num_threads()):
        logger.info("threads: %d, as this run began, instead of %d", recorded, torch.get_num_threads())
        torch.set_num_threads(recorded)


def prepare(config: RunConfig, folder: RunFolder) -> tuple[BaseSource, PreparedData]:
    """Make base and data ready before the model is loaded: everything that can be wrong with either shows here."""
    model = with_pinned_revision(config.model, folder)
    described = resolve_base(model, weights=False)
    check_target_modules(detect(described.config), config.lora.target_modules)
    if config.export.merge:
        check_mergeable(described.config, config)
    data, tokenizer = prepare_tokenizer_and_data(config, described, date=start_date(folder))
    check_can_be_saved(
        tokenizer, described.folder, merged=config.export.merge, trust_remote_code=config.model.trust_remote_code
    )
    return (described if described.revision is None else resolve_base(model)), data


def prepare_again(config: RunConfig, folder: RunFolder) -> tuple[BaseSource, RunRows]:
    """Make the base of a finished run ready, and the rows that it is measured on.

    Raises:
        CheckpointError: the base has changed since, or the rows are damaged.
    """
    return _same_base(folder, config, weights=True), load_rows(folder.rows)


def initial_batches(config: RunConfig, data: PreparedData, loaded: LoadedModel) -> list[dict[str, torch.Tensor]]:
    """Return the first training batches for an initialisation that is computed from data; none for the others."""
    if config.lora.init_lora_weights != "eva":
        return []
    assert isinstance(data.train, Rows), "the config refuses eva with a stream"
    order = epoch_order(data.train.lengths, seed=config.run.seed, epoch=0, batch_size=1, group_by_length=False)
    collate = PaddingCollator(loaded.tokenizer.pad_token_id, padding_multiple(loaded.device))
    return batches_with_labels(
        data.train, order, collate, min_labels=2 * config.lora.r, max_batches=NUM_INITIAL_BATCHES
    )


def facts(
    config: RunConfig, source: BaseSource, data: PreparedData, device: torch.device, date: datetime.date
) -> dict[str, Any]:
    """Return what decides a run besides its settings; what a change of each would do is in `config.decisive`."""
    on_gpu = device.type == "cuda"
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "base": source.name,
        "base_identity": source.identity(),
        "adapter": identity_of(config.lora.adapter_path),
        "date": date.isoformat(),
        "data_fingerprint": data.fingerprint,
        "num_train_rows": data.num_train_rows,
        "num_eval_rows": len(data.eval),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "num_threads": None if on_gpu else torch.get_num_threads(),
        "world_size": 1,
        "versions": library_versions(),
    }


def identity_of(adapter_path: str | None) -> str | None:
    """Return the sha256 of the weights that a run starts from; None where there are none."""
    file = None if adapter_path is None else Path(adapter_path) / "adapter_model.safetensors"
    return atomic_io.sha256_of(file) if file is not None and file.is_file() else None


def write_adapter(
    folder: RunFolder, adapted: AdaptedModel, config: RunConfig, data: PreparedData, result: dict[str, Any]
) -> None:
    """Save the adapter in PEFT's format, with its tokenizer and a filled card: the run is finished when this is there."""
    source = adapted.loaded.source
    metrics = {key: float(result[key]) for key in ("train_loss", "eval_loss") if result[key] is not None}
    folder.delete_results()
    about = {"run_id": folder.metadata()["run_id"], "num_changes": len(folder.metadata()["changes"])}
    with atomic_io.atomic_folder(folder.adapter, about) as staging:
        # "auto" guesses offline that resized embeddings were not modified; new rows are saved by their own tensors
        adapted.model.save_pretrained(str(staging), save_embedding_layers=False)
        save_tokenizer(adapted.loaded.tokenizer, staging, trust_remote_code=config.model.trust_remote_code)
        clean_adapter_config(staging, source.name, source.revision)
        write_card(
            staging,
            base=source.name,
            revision=source.revision,
            config=config,
            metrics=metrics,
            num_train_rows=data.num_train_rows,
            library_versions=library_versions(),
            kind="adapter",
            loading=adapter_loading(adapted.loaded, config, folder.system_prompt()),
        )
        folder.add_results(training=result)
    logger.info("adapter: %s (from step %d)", folder.adapter, result["taken_from_step"])
