"""A run from config to adapter and merged model: the stages in their order.

Every rank of a run of several processes goes through them until training ends; rank 0 alone writes the run folder, and does
what comes after training.
"""

import datetime
import logging
import shutil
from pathlib import Path

import torch

from qlora_train.adapters import attach_adapter, trainable_state
from qlora_train.config import RunConfig
from qlora_train.config.preflight import check_machine
from qlora_train.data import PreparedData
from qlora_train.data.held_out_rows import save_rows
from qlora_train.export.adapter_check import AdapterReference, check_adapter, measure_adapter, measure_again
from qlora_train.export.adapter_writer import write_adapter
from qlora_train.export.finished_run import FinishedRun, reopen
from qlora_train.kernels.fsdp_units import reshard
from qlora_train.models import BaseSource, LoadedModel, load_model
from qlora_train.models.strategy import device_bytes, device_needs, strategy_of_run
from qlora_train.parallel import context
from qlora_train.planning.base_and_data import prepare
from qlora_train.planning.disk import check_disk_space, plan_disk
from qlora_train.planning.promise import Promise
from qlora_train.planning.run_metadata import check_same_data, restore_num_threads, run_metadata
from qlora_train.report.write_report import try_write_report
from qlora_train.runs import RunFolder, critical_changes, record_metadata, write_json
from qlora_train.runs.shared_run import open_shared_run
from qlora_train.training import train
from qlora_train.training.optimizer import choose_optimizer
from qlora_train.training.replicas import copy_from_main_
from qlora_train.utils import signals
from qlora_train.utils.device import deterministic_algorithms, select_device
from qlora_train.utils.errors import ConfigError
from qlora_train.utils.run_events import stage

logger = logging.getLogger(__name__)


def run(config: RunConfig, *, resume: str = "auto", command: str | None = None) -> RunFolder:
    """Train a config, or resume its run; then check the adapter and merge it if the config says so.

    Args:
        config: the resolved config; `run.output_dir` is set.
        resume: `auto`, `never` or the path of a checkpoint.
        command: the command line, without secrets, for the report.

    Raises:
        UserError: an error the user can fix; complete files stay intact.
        Stop: a signal asked the process to stop; the same call resumes.
    """
    is_main = context().is_main
    with (
        signals.time_limit(config.run.max_minutes),
        deterministic_algorithms(config.run.deterministic),
        open_shared_run(config, resume=resume) as (folder, checkpoint),
        context().peer_errors(),
    ):
        trained = None
        if context().broadcast(is_main and folder.is_finished() and not critical_changes(folder, config)):
            logger.info(
                "%s: training has finished already; to train anew, set another run.output_dir, or delete the folder",
                folder.path,
            )
        else:
            trained = train_adapter(config, folder, checkpoint, command)
        context().leave()
        if is_main:
            try_write_report(folder.path)  # checks and merge may take long, or fail
            try:
                _check_and_merge(config, folder, *(trained or (None, None)))
            finally:
                if try_write_report(folder.path):
                    logger.info("report: %s", folder.report_file)
    return folder


def _check_and_merge(
    config: RunConfig, folder: RunFolder, finished: FinishedRun | None, reference: AdapterReference | None
) -> None:
    if not folder.passed_adapter_check():
        with stage("adapter check"):
            _check_adapter(config, folder, finished, reference)
    if config.export.merge and folder.has_merged():
        logger.info("%s exists; delete it to merge again", folder.merged)
    elif config.export.merge:
        from qlora_train.export.merging.merge_finished_run import merge_run

        with stage("merge"):
            merge_run(finished or reopen(folder, config))


def _check_adapter(
    config: RunConfig, folder: RunFolder, finished: FinishedRun | None, reference: AdapterReference | None
) -> None:
    finished = finished or reopen(folder, config)
    needs = device_needs(config, finished.source, device_bytes(select_device()))
    may_be_sharded = folder.metadata()["world_size"] > 1 and config.parallel.strategy in ("auto", "fsdp")
    if may_be_sharded and not needs.base_fits:
        logger.warning("adapter check: skipped (%s, too large for one)", needs)
    else:
        check_adapter(finished, reference or measure_again(finished))


def train_adapter(
    config: RunConfig, folder: RunFolder, checkpoint: Path | None, command: str | None = None
) -> tuple[FinishedRun, AdapterReference] | None:
    """Prepare the data, load the base, train an adapter, write and measure it; the model is freed on return.

    Returns:
        The run and the measurements; None on ranks other than 0.
    """
    this, device = context(), select_device()
    restore_num_threads(folder, device, config.run.allow_changed)
    date = this.broadcast(folder.start_date())  # preparing the data may last until the next day
    with stage("data"):
        with this.local_main_first():
            check_machine(config)
            source, data = prepare(config, folder, date=date)
        check_same_data(source, data)
        if this.is_main:
            _record_start(config, folder, source, data, device, date)
            if command is not None:
                folder.record_command(command)
        this.barrier()

    strategy = strategy_of_run(config, source, device)
    if strategy == "fsdp" and config.run.samples:
        raise ConfigError("run.samples: rank 0 generates alone, which fsdp (its strategy) does not support; drop it")
    promise = Promise.of(config, folder, source, data, device, strategy) if this.is_main else None
    with stage("base"):
        loaded = load_model(config.model, config.quantization, source=source, shard=strategy == "fsdp")
        _log_base(loaded)
    with stage("adapter"):
        adapted = attach_adapter(loaded, config.lora, seed=config.run.seed, data=None if checkpoint else data)
        copy_from_main_(trainable_state(adapted.model))
    optim = this.broadcast(choose_optimizer(config.train.optim, adapted, checkpoint))
    resolved = config.model_copy(update={"train": config.train.model_copy(update={"optim": optim})})
    if this.is_main:
        if checkpoint:
            folder.delete_checkpoints_after(checkpoint)
        plan = plan_disk(folder, adapted, resolved, data, checkpoint)
        check_disk_space(folder, plan, shutil.disk_usage(folder.path).free)
    this.barrier()  # an error of rank 0 ends the others here: in a gather of FSDP over NCCL they would wait

    result = train(adapted, data, resolved, folder, checkpoint, flops=promise.flops if promise else None)
    if promise is not None:
        promise.measure()
    if strategy == "fsdp":
        reshard(adapted.model)  # on all ranks, as rank 0 does when it saves
    else:
        this.leave()
    if promise is not None:
        write_adapter(folder, adapted, config, data, result)
        promise.keep(result)
    elif strategy != "fsdp":
        return None
    reference = measure_adapter(folder, config, data, adapted.model, loaded, folder.start_date())
    context().leave()
    return (FinishedRun.of(folder, config, source), reference) if this.is_main else None


def _log_base(loaded: LoadedModel) -> None:
    """Log the base in one line; run.log has the reasons of each choice."""
    summary, name = loaded.quantization_summary, loaded.source.name
    num_bytes = summary.total_bytes
    size = f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
    logger.info(
        "base: %s (%s), %s, %s, %.1f %% of %s linear weights in 4 bits, %s",
        Path(name).name if Path(name).exists() else name, loaded.model.config.model_type,
        str(loaded.compute_dtype).removeprefix("torch."), loaded.model.config._attn_implementation,
        100 * summary.quantized_share, f"{summary.num_linear_weights:,}", size,
    )  # fmt: skip


def _record_start(
    config: RunConfig,
    folder: RunFolder,
    source: BaseSource,
    data: PreparedData,
    device: torch.device,
    date: datetime.date,
) -> None:
    """Write what determines the run, its data report and the rows that evaluation and merge use."""
    record_metadata(folder, config, run_metadata(config, source, data, device, date))
    data.report.log()
    write_json(folder.data_report_file, data.report.to_json())
    save_rows(folder.rows, data, data.fingerprint)
    if results := folder.existing_results():
        names = ", ".join(path.name for path in results)
        logger.warning("%s: training further will replace the adapter and delete %s", folder.path, names)
