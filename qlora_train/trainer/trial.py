"""The longest batch is tried before the first step: out of memory is told at once, not hours into a run.

Nothing of the trial stays: gradients are dropped, the random generators put back, no weight is changed.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from qlora_train import durable
from qlora_train.checkpoint import RunFolder, random_state, restore_random_state
from qlora_train.config import RunConfig
from qlora_train.device import free_memory
from qlora_train.errors import TrainingError, is_out_of_memory
from qlora_train.evaluate import held_out_loss
from qlora_train.loss import IGNORED, label_losses
from qlora_train.trainer.ladder import Rung, next_rung, next_rung_of_evaluation, on_rung, overrides
from qlora_train.trainer.sft import QloraTrainer

logger = logging.getLogger(__name__)

Make = Callable[[RunConfig], QloraTrainer]
"""Returns a trainer of these settings, on the one model of the run."""


def fitting_trainer(make: Make, config: RunConfig, run: RunFolder, *, resumes: bool) -> QloraTrainer:
    """Return a trainer whose longest batches fit into memory: as configured, or with `train.auto_fit` further down.

    Raises:
        TrainingError: they do not fit; the message has the settings that do, when there are any.
    """
    rung = run.fit() if config.train.auto_fit else {}
    failed = ""
    while True:
        settings = on_rung(config, rung)
        trainer = make(settings)
        failure = _try(trainer)
        if failure is None:
            break
        trainer.model.zero_grad(set_to_none=True)
        del trainer
        free_memory()
        failed = failed or failure[0]
        lower = failure[1](settings)
        if lower is None:
            raise TrainingError(
                f"out of memory: {failed}, and in no smaller pieces either ({overrides(rung) or 'as configured'}); lower "
                "data.max_length or lora.r, or use a device with more memory"
            )
        rung = {**rung, **lower}
    if failed:
        _take(run, rung, failed, auto_fit=config.train.auto_fit, resumes=resumes)
    return trainer


def step_down(config: RunConfig, run: RunFolder, step: int) -> TrainingError:
    """Record the next rung after a run that had fitted ran out of memory after all, and return the error to raise."""
    rung = run.fit() if config.train.auto_fit else {}
    lower = next_rung(on_rung(config, rung))
    if lower is None:
        return TrainingError(
            f"out of memory after step {step}, in the smallest pieces there are; lower data.max_length or lora.r, or use a "
            "device with more memory"
        )
    record(run, {**rung, **lower})
    how = "the same command" if config.train.auto_fit else "the command with train.auto_fit=true"
    return TrainingError(
        f"out of memory after step {step}; {how} goes on from the last checkpoint with {overrides(lower)}"
    )


def record(run: RunFolder, rung: Rung) -> None:
    """Write down the rung that a run goes on with."""
    durable.write_json(run.facts_file, {**run.facts(), "fit": dict(rung)})


def _take(run: RunFolder, rung: Rung, failed: str, *, auto_fit: bool, resumes: bool) -> None:
    """Go on with a rung that fits, or say which does."""
    if auto_fit:
        logger.warning("out of memory: %s; the run goes on with %s, which changes no update", failed, overrides(rung))
        record(run, rung)
        return
    typed = "" if resumes else f"{overrides(rung)} (tried: fits, with the same updates), or with "
    raise TrainingError(f"out of memory: {failed}; repeat the command with {typed}train.auto_fit=true")


def _try(trainer: QloraTrainer) -> tuple[str, Callable[[RunConfig], Rung | None]] | None:
    """Try the longest batches of training and of evaluation; say which did not fit, and how to make it smaller."""
    batch = trainer.longest_batch()
    rows, tokens = len(batch["row"]), batch["input_ids"].numel()
    name = f"the longest micro-batch has {rows} rows, {tokens:,} tokens with padding"
    if not _fits(trainer, lambda: _train_step(trainer, batch)):
        return name, next_rung
    longest = trainer.longest_eval_rows()
    if longest and not _fits(trainer, lambda: _evaluation(trainer, longest)):
        return f"the longest {len(longest)} rows of an evaluation", next_rung_of_evaluation
    peak = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most" if torch.cuda.is_available() else ""
    logger.info("memory: %s, fits%s", name, peak)
    return None


def _fits(trainer: QloraTrainer, work: Callable[[], Any]) -> bool:
    try:
        with _without_trace(trainer):
            work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


@contextmanager
def _without_trace(trainer: QloraTrainer) -> Iterator[None]:
    state = random_state()
    try:
        yield
    finally:
        trainer.model.zero_grad(set_to_none=True)
        restore_random_state(state)


def _train_step(trainer: QloraTrainer, batch: Mapping[str, torch.Tensor]) -> None:
    inputs = {name: tensor.to(trainer.args.device) for name, tensor in batch.items() if name != "row"}
    trainer.model.train()
    with trainer.accelerator.autocast():  # as inside the training loop, which begins later
        losses, _ = label_losses(trainer.model, **inputs)
    (losses.sum() / max(int((batch["labels"] != IGNORED).sum()), 1)).backward()


def _evaluation(trainer: QloraTrainer, rows: Any) -> None:
    with trainer.accelerator.autocast():
        held_out_loss(trainer.model, rows, batch_size=len(rows), pad_token_id=trainer.pad_token_id)
