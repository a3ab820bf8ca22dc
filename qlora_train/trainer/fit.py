"""Train an adapter from where it stands to the end of its run."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qlora_train.adapter import AdaptedModel
from qlora_train.checkpoint import RunFolder
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.trainer.progress import Progress
from qlora_train.trainer.sft import STATE_FILE, QloraTrainer

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
        `num_tokens`, `num_trainable` of `num_parameters`, and `train_seconds` of this part of the run.

    Raises:
        TrainingError: a non-finite loss or gradient.
    """
    patience = config.train.early_stopping_patience
    progress = Progress(run)
    callbacks = [progress] if patience is None else [progress, EarlyStopping(patience)]
    trainer = QloraTrainer(adapted, data, config, run, callbacks)
    started = time.perf_counter()
    if resume_from is not None and _nothing_left(resume_from, patience):
        trainer.restore(resume_from)
    else:
        try:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        finally:
            progress.stop()
    evaluations = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    taken_from = trainer.state.global_step
    if config.train.load_best_model_at_end and evaluations:
        taken_from = min(evaluations, key=lambda step: evaluations[step])
        trainer.load_adapter_of(taken_from)
        logger.info("best model: step %d (eval_loss %.4f)", taken_from, evaluations[taken_from])
    return {
        "steps": trainer.state.global_step,
        "taken_from_step": taken_from,
        "train_loss": trainer.mean_loss,
        "eval_loss": evaluations.get(taken_from),
        "num_tokens": int(trainer.state.num_input_tokens_seen),
        "num_trainable": adapted.num_trainable,
        "num_parameters": adapted.num_total,
        "train_seconds": time.perf_counter() - started,
    }


def _nothing_left(checkpoint: Path, patience: int | None) -> bool:
    """Say whether a run had ended at this checkpoint, at its last step or by early stopping."""
    state: Mapping[str, Any] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    out_of_patience = patience is not None and steps_since_best(state["log_history"]) >= patience
    return out_of_patience or state["global_step"] >= state["max_steps"]


def steps_since_best(log_history: Sequence[Mapping[str, float]]) -> int:
    """Return how many evaluations have followed the one with the lowest loss."""
    losses = [entry["eval_loss"] for entry in log_history if "eval_loss" in entry]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class EarlyStopping(TrainerCallback):
    """Stop after `patience` evaluations in a row without a lower loss; decided from the logged history alone."""

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Look at all evaluations so far."""
        if steps_since_best(state.log_history) >= self._patience:
            logger.info("early stopping: eval_loss has not fallen for %d evaluations", self._patience)
            control.should_training_stop = True
