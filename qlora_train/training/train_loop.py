"""Train an adapter from its last checkpoint to the end of its run, or until a stop."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.config import RunConfig
from qlora_train.config.objectives import dataset_type_of
from qlora_train.data import PreparedData
from qlora_train.evaluation.objective_table import Objective, make_objective
from qlora_train.parallel import context
from qlora_train.runs import RunFolder
from qlora_train.runs.training_state import checkpoint_errors
from qlora_train.training.flops_utilization import ModelFlops
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing
from qlora_train.training.memory.auto_batch_size import fitting_trainer, record_fallback
from qlora_train.training.memory.dequantized_cache import fill_cache
from qlora_train.training.parity.fused_kernels import choose_fused_kernels
from qlora_train.training.progress import ProgressCallback
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.training.replicas import copy_from_main_
from qlora_train.training.row_losses import record_row_losses
from qlora_train.training.step_end import best_step, evaluations
from qlora_train.training.step_guard import check_finite, check_trained
from qlora_train.training.timed_run import fix_num_steps, with_recorded_steps
from qlora_train.training.tracking import end_trackers_early
from qlora_train.utils import signals
from qlora_train.utils.run_events import stage

logger = logging.getLogger(__name__)


def train(
    adapted: AdaptedModel,
    data: PreparedData,
    config: RunConfig,
    run: RunFolder,
    resume_from: Path | None,
    *,
    objective: Objective | None = None,
    flops: ModelFlops | None = None,
) -> dict[str, Any]:
    """Train the adapter in place.

    Args:
        resume_from: a complete checkpoint, or None.
        objective: what is trained; None: that of the config.
        flops: of the model, for MFU; None: it is not logged.

    Returns:
        `steps`, `taken_from_step` (the best step, if the config asks for it), `train_loss`, `eval_loss`,
        `NonFiniteGuard.counts`, `num_tokens`, `num_trainable`, `num_parameters`; of all processes of the run
        `train_seconds` and, of these, the `step_seconds` of optimizer steps; and `since_last_start`: steps, tokens and
        seconds since this process started or resumed the run, and `reference_seconds` before them.

    Raises:
        TrainingError: out of memory, a non-finite number or a loss spike that stops the run, or an untrained adapter.
        Stop: the process was asked to stop; a checkpoint of the last step was saved.
    """
    config = with_recorded_steps(config, run, resume_from)
    objective = objective or make_objective(config.train, config.lora, adapted.model)
    progress = ProgressCallback(run, objective.loss.log_formats)
    with signals.stops_deferred():
        trainer = _make_trainer(adapted, data, config, run, progress, objective, flops)
        reference_time = {}
        if objective.reference is not None:
            from qlora_train.training.stored_reference import store_reference_logps

            reference_time["reference_seconds"] = store_reference_logps(trainer, config, run)
        with stage("training"), record_fallback(trainer, config, run):
            fix_num_steps(trainer, config, run)
            _run_steps(trainer, progress, resume_from)
            signals.raise_if_requested()  # inside the stage, which is not done
    times = trainer.clock.state()
    since_last_start = {**trainer.clock.since_last_start(trainer.state), **reference_time}
    step = _load_result(trainer)
    check_finite(step, trainable_state(adapted.model), {})
    check_trained(step, trainable_state(adapted.model), num_updates=trainer.guard.num_updates)
    record_row_losses(trainer, step)
    return {
        "steps": trainer.state.global_step,
        "taken_from_step": step,
        "train_loss": trainer.guard.mean_loss,
        "eval_loss": evaluations(trainer.state.log_history).get(step),
        **trainer.guard.counts(),
        "num_tokens": int(trainer.state.num_input_tokens_seen),
        "num_trainable": adapted.num_trainable,
        "num_parameters": adapted.num_total,
        "train_seconds": times["train_seconds"],
        "step_seconds": times["step_seconds"],
        "since_last_start": since_last_start,
    }


def _make_trainer(
    adapted: AdaptedModel,
    data: PreparedData,
    config: RunConfig,
    run: RunFolder,
    progress: ProgressCallback,
    objective: Objective,
    flops: ModelFlops | None,
) -> QloraTrainer:
    with stage("parity check"):
        fused = choose_fused_kernels(adapted, data, config, run)
        if fused is not None:
            fill_cache(fused.weights, config.train.dequantized_cache_gb, adapted.loaded.device)
    layers = LayerCheckpointing(adapted.model, fused.mlps if fused is not None else [])

    callbacks = [*_sample_callbacks(adapted, data, config, run), progress, *_pair_callbacks(data, config)]

    def make(fitted: RunConfig) -> QloraTrainer:
        return QloraTrainer(
            adapted, data, fitted, run, callbacks, group_batch_size=config.train.per_device_train_batch_size,
            layer_checkpointing=layers, has_fused_kernels=fused is not None, objective=objective, flops=flops,
            clock=progress.clock,
        )  # fmt: skip

    with stage("memory"):
        return fitting_trainer(make, config, run)


def _sample_callbacks(
    adapted: AdaptedModel, data: PreparedData, config: RunConfig, run: RunFolder
) -> list[TrainerCallback]:
    if not config.run.samples:
        return []
    from qlora_train.training.held_out_samples import SampleCallback

    return [SampleCallback(config, run, adapted.loaded.tokenizer, data.eval)]


def _pair_callbacks(data: PreparedData, config: RunConfig) -> list[TrainerCallback]:
    if dataset_type_of(config.train.objective) != "preference":
        return []
    from qlora_train.training.chosen_logps import ChosenLogpCallback

    return [ChosenLogpCallback(config.train, has_eval=bool(len(data.eval)))]


def _run_steps(trainer: QloraTrainer, progress: ProgressCallback, resume_from: Path | None) -> None:
    """Run a pending evaluation and the remaining steps."""
    begins = f"starts ({trainer.schedule.total_steps} steps)" if resume_from is None else f"resumes from {resume_from}"
    logger.info("training: %s", begins)
    if resume_from is not None:
        with checkpoint_errors(resume_from):
            trainer.restore(resume_from)
            progress.rewrite_metrics(trainer.state.log_history)
            is_pending = trainer.has_pending_evaluation()
        if is_pending:
            trainer.run_pending_evaluation(resume_from)
        if trainer.is_finished():
            return
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except signals.Stop:  # during an evaluation: the step before it is complete
        end_trackers_early(trainer, failed=False)
        trainer.save()
        raise
    except Exception:
        end_trackers_early(trainer, failed=True)
        raise


def _load_result(trainer: QloraTrainer) -> int:
    """Load the best adapter if the config asks for it, and return the step of the model's adapter."""
    history = trainer.state.log_history
    best = best_step(history) if trainer.config.train.load_best_model_at_end else None
    if best is None:
        return int(trainer.state.global_step)
    if context().is_main:
        trainer.load_adapter(best)
    copy_from_main_(trainable_state(trainer.model))
    logger.info("best model: step %d (eval_loss %.4f)", best, evaluations(history)[best])
    return best
