"""Train an adapter from where it stands to the end of its run, or to where it is asked to stop."""

import logging
from pathlib import Path
from typing import Any

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.runs import RunFolder, checkpoint_errors
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing
from qlora_train.training.memory.auto_batch_size import fitting_trainer, record_fallback
from qlora_train.training.memory.dequantized_cache import fill_cache
from qlora_train.training.parity.fused_kernels import choose_fused_kernels
from qlora_train.training.progress import Progress
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.training.step_end import best_step, evaluations
from qlora_train.training.step_guard import check_finite, check_trained
from qlora_train.utils import signals

logger = logging.getLogger(__name__)


def train(
    adapted: AdaptedModel, data: PreparedData, config: RunConfig, run: RunFolder, resume_from: Path | None
) -> dict[str, Any]:
    """Train the adapter in place.

    Args:
        adapted: the model; its adapter is trained and left in the model.
        data: tokens and masks.
        config: the run's settings.
        run: where checkpoints and metrics go.
        resume_from: a whole checkpoint to continue from, or None.

    Returns:
        What happened: `steps`, `taken_from_step` (the best one if the config asks for it), `train_loss`, `eval_loss`,
        `NonFiniteGuard.counts`, `num_tokens`, `num_trainable` of `num_parameters`, and `since_last_start`: steps, tokens
        and seconds of training since this process began or resumed the run.

    Raises:
        TrainingError: out of memory, a number that is not finite, or a spike of the loss, that the config does not bear;
            an adapter that is still zero at the end.
        Stop: the process was asked to stop; a checkpoint of the last whole step has been saved.
    """
    progress = Progress(run)

    def make(fitted: RunConfig) -> QloraTrainer:
        asked_rows = config.train.per_device_train_batch_size
        return QloraTrainer(
            adapted, data, fitted, run, [progress], group_batch_size=asked_rows, layer_checkpointing=layer_checkpointing,
            on_fused_kernels=fast is not None,
        )  # fmt: skip

    with signals.stops_deferred():
        fast = choose_fused_kernels(adapted, data, config, run)
        if fast is not None:
            fill_cache(fast.weights, config.train.dequantized_cache_gb, adapted.loaded.device)
        layer_checkpointing = LayerCheckpointing(adapted.model, fast.mlps if fast is not None else [])
        trainer = fitting_trainer(make, config, run)
        try:
            with record_fallback(trainer, config, run):
                _train_on(trainer, progress, resume_from)
        finally:
            progress.stop()
    since_last_start = progress.since_last_start(trainer.state)
    losses = evaluations(trainer.state.log_history)
    taken_from: int = trainer.state.global_step
    best = best_step(trainer.state.log_history)
    if config.train.load_best_model_at_end and best is not None:
        taken_from = best
        trainer.load_adapter_of(best)
        logger.info("best model: step %d (eval_loss %.4f)", best, losses[best])
    check_finite(taken_from, trainable_state(adapted.model), {})
    check_trained(taken_from, trainable_state(adapted.model), num_updates=trainer.numbers.num_taken)
    return {
        "steps": trainer.state.global_step,
        "taken_from_step": taken_from,
        "train_loss": trainer.numbers.mean_loss,
        "eval_loss": losses.get(taken_from),
        **trainer.numbers.counts(),
        "num_tokens": int(trainer.state.num_input_tokens_seen),
        "num_trainable": adapted.num_trainable,
        "num_parameters": adapted.num_total,
        "since_last_start": since_last_start,
    }


def _train_on(trainer: QloraTrainer, progress: Progress, resume_from: Path | None) -> None:
    """Do the steps that are left, and the evaluation that a stop left out before them."""
    if resume_from is not None:
        with checkpoint_errors(resume_from):
            trainer.restore(resume_from)
            progress.rewrite_metrics(trainer.state.log_history)
            has_pending_evaluation = trainer.has_pending_evaluation()
        if has_pending_evaluation:
            trainer.run_pending_evaluation(resume_from)
        if trainer.is_over():
            return
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except signals.Stop:  # in an evaluation: the step before it is whole
        trainer.save()
        raise
