"""A run from config to adapter and merged model, and what can be done with a finished run."""

import datetime
import logging
import platform
import shutil
from collections.abc import Sequence
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
from qlora_train.data.held_out_rows import load_rows, save_rows
from qlora_train.data.token_store import Rows
from qlora_train.export.adapter_check import AdapterReference, check_adapter, measure_adapter
from qlora_train.export.export_formats import EXPORT_FORMATS, ExportRequest
from qlora_train.export.gguf.converter import find_converter
from qlora_train.export.hub_upload import Upload, plan_upload
from qlora_train.export.merging.merge import check_mergeable
from qlora_train.export.merging.merge_run import merge_run
from qlora_train.export.merging.verify import MergeResult
from qlora_train.export.model_card import adapter_loading, clean_adapter_config, library_versions, write_card
from qlora_train.inference.eval_report import EvalSettings, evaluate_run
from qlora_train.inference.finished_run import (
    FinishedRun,
    open_finished_run,
    reopen,
    start_date,
    with_pinned_revision,
)
from qlora_train.models import BaseSource, LoadedModel, load_model, resolve_base
from qlora_train.models.tokenizer import check_can_be_saved, save_tokenizer
from qlora_train.planning.disk import check_disk_space, plan_disk
from qlora_train.planning.inspect_data import prepare_tokenizer_and_data
from qlora_train.runs import RunFolder, critical_changes, finished_run, open_run, record_metadata, run_lock, write_json
from qlora_train.training import train
from qlora_train.training.optimizer import choose_optimizer
from qlora_train.utils import atomic_io, signals
from qlora_train.utils.device import deterministic_algorithms, free_memory, select_device
from qlora_train.utils.errors import ExportError

logger = logging.getLogger(__name__)

NUM_INITIAL_BATCHES = 64
"""Maximum batches for a data-driven initialisation, which stops when it has converged."""


def run(config: RunConfig, *, resume: str = "auto") -> RunFolder:
    """Train a config, or resume its run; then check the adapter and merge it if the config says so.

    Args:
        config: the resolved config; `run.output_dir` is set.
        resume: `auto`, `never` or the path of a checkpoint.

    Raises:
        UserError: an error the user can fix; complete files stay intact.
        Stop: a signal asked the process to stop; the same call resumes.
    """
    device = select_device()
    with (
        signals.time_limit(config.run.max_minutes),
        deterministic_algorithms(config.run.deterministic),
        open_run(config, resume=resume) as (folder, checkpoint),
    ):
        reference = None
        if folder.is_finished() and not critical_changes(folder, config):
            logger.info("%s: training has finished already; delete the folder to train again", folder.path)
        else:
            if device.type == "cpu" and "num_threads" not in config.run.allow_changed:
                restore_num_threads(folder)
            check_machine(config)
            source, data = prepare(config, folder)
            record_metadata(folder, config, run_metadata(config, source, data, device, start_date(folder)))
            data.report.log()
            write_json(folder.data_report_file, data.report.to_json())
            save_rows(folder.rows, data, data.fingerprint)
            reference = train_adapter(folder, config, source, data, checkpoint)
        if not folder.read_results().get("adapter_check", {}).get("passed"):
            reference = reference or measure_again(reopen(folder, config))
            free_memory()
            check_adapter(folder, config, reference)
        if config.export.merge and folder.has_merged():
            logger.info("%s exists; delete it to merge again", folder.merged)
        elif config.export.merge:
            _merge(reopen(folder, config))
    return folder


def prepare(config: RunConfig, folder: RunFolder) -> tuple[BaseSource, PreparedData]:
    """Resolve the base and prepare the data; every error in either shows here, before the model is loaded."""
    model = with_pinned_revision(config.model, folder)
    source = resolve_base(model, weights=False)
    check_target_modules(detect(source.config), config.lora.target_modules)
    if config.export.merge:
        check_mergeable(source.config, config)
    data, tokenizer = prepare_tokenizer_and_data(config, source, date=start_date(folder))
    check_can_be_saved(
        tokenizer, source.folder, merged=config.export.merge, trust_remote_code=config.model.trust_remote_code
    )
    return (source if source.revision is None else resolve_base(model)), data


def train_adapter(
    folder: RunFolder, config: RunConfig, source: BaseSource, data: PreparedData, checkpoint: Path | None
) -> AdapterReference:
    """Load the base, train an adapter, write and measure it; the model is freed on return."""
    if results := folder.existing_results():
        names = ", ".join(path.name for path in results)
        logger.warning("%s: training further will replace the adapter and delete %s", folder.path, names)
    loaded = load_model(config.model, config.quantization, source=source)
    batches = [] if checkpoint else initial_batches(config, data, loaded)  # a checkpoint replaces the initial weights
    adapted = attach_adapter(loaded, config.lora, seed=config.run.seed, batches=batches)
    if checkpoint:
        folder.delete_checkpoints_after(checkpoint)
    optim = choose_optimizer(config.train.optim, adapted, checkpoint)
    resolved = config.model_copy(update={"train": config.train.model_copy(update={"optim": optim})})
    check_disk_space(
        folder, plan_disk(folder, adapted, resolved, data, checkpoint), shutil.disk_usage(folder.path).free
    )
    logger.info("training: %s", f"resumes from {checkpoint}" if checkpoint else "starts")
    result = train(adapted, data, resolved, folder, checkpoint)
    write_adapter(folder, adapted, config, data, result)
    return measure_adapter(folder, config, data, adapted.model, loaded, start_date(folder))


def write_adapter(
    folder: RunFolder, adapted: AdaptedModel, config: RunConfig, data: PreparedData, result: dict[str, Any]
) -> None:
    """Save the adapter in PEFT's format with its tokenizer and card; this finishes the run."""
    loaded = adapted.loaded
    source, trust_remote_code = loaded.source, config.model.trust_remote_code
    folder.delete_results()
    recorded = folder.metadata()
    metadata = {"run_id": recorded["run_id"], "num_changes": len(recorded["changes"])}
    with atomic_io.atomic_folder(folder.adapter, metadata) as staging:
        # "auto" guesses offline that resized embeddings were not modified; new rows are saved by their own tensors
        adapted.model.save_pretrained(str(staging), save_embedding_layers=False)
        save_tokenizer(loaded.tokenizer, staging, trust_remote_code=trust_remote_code)
        clean_adapter_config(staging, source.name, source.revision)
        write_card(
            staging, base=source.name, revision=source.revision, config=config,
            metrics={key: float(result[key]) for key in ("train_loss", "eval_loss") if result[key] is not None},
            num_train_rows=data.num_train_rows, kind="adapter",
            loading=adapter_loading(loaded, config, folder.system_prompt()),
        )  # fmt: skip
        folder.add_results(training=result)
    logger.info("adapter: %s (step %d)", folder.adapter, result["taken_from_step"])


def initial_batches(config: RunConfig, data: PreparedData, loaded: LoadedModel) -> list[dict[str, torch.Tensor]]:
    """Return the first training batches if the initialisation is computed from data."""
    if config.lora.init_lora_weights != "eva":
        return []
    assert isinstance(data.train, Rows), "the config refuses eva with a stream"
    order = epoch_order(data.train.lengths, seed=config.run.seed, epoch=0, batch_size=1, group_by_length=False)
    collate = PaddingCollator(loaded.tokenizer.pad_token_id, padding_multiple(loaded.device))
    return batches_with_labels(
        data.train, order, collate, min_labels=2 * config.lora.r, max_batches=NUM_INITIAL_BATCHES
    )


def run_metadata(
    config: RunConfig, source: BaseSource, data: PreparedData, device: torch.device, date: datetime.date
) -> dict[str, Any]:
    """Return what determines a run besides its settings (`config.resume_policy` has the consequence of each change)."""
    on_gpu = device.type == "cuda"
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    adapter_path = config.lora.adapter_path
    weights = Path(adapter_path or "") / "adapter_model.safetensors"
    return {
        "base": source.name,
        "base_identity": source.identity(),
        "adapter": atomic_io.sha256_of(weights) if adapter_path is not None and weights.is_file() else None,
        "date": date.isoformat(),
        "data_fingerprint": data.fingerprint,
        "num_train_rows": data.num_train_rows,
        "num_eval_rows": len(data.eval),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "num_threads": None if on_gpu else torch.get_num_threads(),
        "world_size": 1,
        "versions": library_versions(),
    }


def restore_num_threads(folder: RunFolder) -> None:
    """Use as many threads as the run started with: how sums are split determines how they are rounded."""
    recorded = folder.metadata().get("num_threads")
    if recorded not in (None, torch.get_num_threads()):
        logger.info("threads: %d, as at the start of the run (not %d)", recorded, torch.get_num_threads())
        torch.set_num_threads(recorded)


# --- finished runs ----------------------------------------------------------------------------------------------------


def measure_again(run: FinishedRun) -> AdapterReference:
    """Measure the adapter of a run that ended before its adapter was checked."""
    loaded = load_model(run.config.model, run.config.quantization, source=run.source)
    model = load_trained(loaded, run.folder.adapter)
    return measure_adapter(run.folder, run.config, load_rows(run.folder.rows), model, loaded, run.date)


def merge(path: Path, overrides: Sequence[str] = (), *, device: str | None = None) -> MergeResult:
    """Merge the adapter of a finished run into 16-bit weights; overrides are `export.key=value`."""
    run = open_finished_run(path, overrides)
    with run_lock(run.folder):
        return _merge(run, device)


def _merge(run: FinishedRun, device: str | None = None) -> MergeResult:
    free_memory()
    rows = load_rows(run.folder.rows)
    return merge_run(run.folder, run.config, run.source, rows, run.date, device or str(select_device()))


def evaluate(path: Path, settings: EvalSettings) -> dict[str, Any]:
    """Evaluate base, adapter and merged model of a finished run on its held-out rows."""
    run = open_finished_run(path)
    with run_lock(run.folder):
        return evaluate_run(run, settings)


def export(path: Path, *, format_name: str, quant: str | None = None, llama_cpp: Path | None = None) -> Path:
    """Write a finished run in a format of `EXPORT_FORMATS` and return its folder; merge first if the format needs it.

    Args:
        quant: number format of a GGUF file; None for the default.
        llama_cpp: a checkout of llama.cpp; None for the installed package.
    """
    export_format = EXPORT_FORMATS[format_name]
    quant = export_format.choose_quant(quant)
    folder = finished_run(path)
    if export_format.quants:
        find_converter(llama_cpp)  # before a merge that takes long
    config = load_config(folder.config_file)
    with run_lock(folder):
        source = None
        if export_format.needs != "merged model":
            source = reopen(folder, config, weights=export_format.needs == "base weights").source
        elif not folder.has_merged():
            logger.info("%s: missing or damaged (merging first)", folder.merged)
            _merge(reopen(folder, config))
        return export_format.write(ExportRequest(folder, config, source, quant, llama_cpp))


def planned_upload(path: Path, repo: str, *, what: str, private: bool) -> Upload:
    """Return what a finished run would upload to the Hub; `what` is `adapter` or `merged`.

    Raises:
        ExportError: no merged model, or something in the folder must not be uploaded.
    """
    folder = finished_run(path)
    if what == "merged" and not folder.has_merged():
        raise ExportError(f"{folder.merged}: missing or damaged; make it with: qlora-train merge {folder.path}")
    return plan_upload(folder.merged if what == "merged" else folder.adapter, repo, private=private)
