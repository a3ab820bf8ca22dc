"""A trainer whose largest batch fits into memory: as asked for, or on the first rung of the ladder that does."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qlora_train.config import RunConfig
from qlora_train.config.memory_fallbacks import Capabilities, as_overrides, changed_settings, next_fallback
from qlora_train.config.schema import TrainSection
from qlora_train.runs import RunFolder, apply_fitted_settings, record_fitted_settings
from qlora_train.training.memory.activation_checkpointing import kept_bytes, plan_levels
from qlora_train.training.memory.memory_probe import Trial, compute_largest_batch, try_largest_batch
from qlora_train.training.padding_free import lower_token_budget
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.utils.device import catch_out_of_memory, spare_bytes
from qlora_train.utils.errors import TrainingError, first_line, is_out_of_memory

logger = logging.getLogger(__name__)

SHARES_OF_BUDGET = (1.0, 0.75, 0.5)
"""Of the memory that is free, what layers are given to keep: less where more turns out not to fit."""
AUTO_FIT = "train.auto_find_batch_size=true"
NOTHING_SMALLER = (
    "no smaller setting is left; lower data.max_length or lora.r, take a smaller model, or free memory that others use"
)


def trainer_that_fits(make: Callable[[RunConfig], QloraTrainer], config: RunConfig, run: RunFolder) -> QloraTrainer:
    """Return a trainer whose largest micro-batch has been tried and fits.

    Args:
        make: makes a trainer; its training settings may be those of a rung.
        config: what the user asked for.
        run: remembers the rung.

    Raises:
        TrainingError: what was asked for does not fit, with what does; or nothing does.
    """
    train = recorded = apply_fitted_settings(run, config.train) if config.train.auto_find_batch_size else config.train
    if recorded != config.train:
        logger.warning(
            "memory: goes on with %s (%s)",
            as_overrides(changed_settings(config.train, recorded)),
            run.fitted_settings_file,
        )
    trainer = make(_with(config, train))
    first = trial = try_largest_batch(trainer)
    problem = trial.problem or _too_little_left(trainer, trial)
    if problem is not None and lower_token_budget(run, problem):
        return trainer_that_fits(make, config, run)
    while trial.problem is not None:
        smaller = next_fallback(train, _able(trainer))
        if smaller is None:
            raise TrainingError(f"out of memory: {trial.tried} does not fit ({trial.problem}); {NOTHING_SMALLER}")
        logger.warning("memory: %s does not fit; tries %s", trial.tried, as_overrides(changed_settings(train, smaller)))
        train = smaller
        trainer = make(_with(config, train))
        trial = try_largest_batch(trainer)
    if train != recorded:
        _take_or_refuse(config, run, train, first)
    chooses = "auto" == train.gradient_checkpointing == train.recompute and not train.activation_offloading
    if trial.peak_bytes is not None and chooses:
        trial = keep_more(trainer, trial, spare_bytes(trainer.adapted.loaded.device, trial.peak_bytes))
        recomputes = set(trainer.recomputation.levels) != {"none"}
        if recomputes and not run.has_begun() and lower_token_budget(run, "memory goes to activations first"):
            return trainer_that_fits(make, config, run)
    logger.info("memory: %s: fits%s", trial.tried, trial.memory)
    return trainer


def keep_more(trainer: QloraTrainer, trial: Trial, budget_bytes: float) -> Trial:
    """Let as many layers as a budget holds keep what they would compute again, and try that; return the last trial.

    Args:
        trainer: its layers keep their inputs alone.
        trial: of that, which fits.
        budget_bytes: what the layers may keep in all beyond that.
    """
    layers = trainer.recomputation
    if not layers.can("layer"):
        return trial
    kept, problem = catch_out_of_memory(
        lambda: kept_bytes(trainer.model, layers, lambda: compute_largest_batch(trainer))
    )
    for share in SHARES_OF_BUDGET:
        if kept is None:
            break
        layers.set(plan_levels(kept, layers.work, share * budget_bytes))
        tried = try_largest_batch(trainer)
        problem = tried.problem or _too_little_left(trainer, tried)
        if problem is None:
            logger.info("recompute: %s (train.recompute: auto)", layers.described())
            return tried
    layers.set("layer")
    logger.warning("recompute: layer; letting layers keep more was tried and did not fit (%s)", problem)
    return trial


def _too_little_left(trainer: QloraTrainer, tried: Trial) -> str | None:
    """Return why what fits once may not fit at every step; None where it will."""
    spare = 0 if tried.peak_bytes is None else spare_bytes(trainer.adapted.loaded.device, tried.peak_bytes)
    return None if spare >= 0 else f"{-spare / 1e9:.1f} GB too little are left for fragmentation"


def _take_or_refuse(config: RunConfig, run: RunFolder, fitted: TrainSection, first: Trial) -> None:
    changes = as_overrides(changed_settings(config.train, fitted))
    record_fitted_settings(run, config.train, fitted, f"{first.tried} did not fit: {first.problem}")
    if config.train.auto_find_batch_size:
        logger.warning("memory: %s did not fit; the run trains with %s", first.tried, changes)
        return
    ways = f"{AUTO_FIT}, which takes these" if run.has_begun() else f"these settings, or {AUTO_FIT}, which takes them"
    raise TrainingError(
        f"out of memory: {first.tried} does not fit ({first.problem}); what fits was tried: {changes}; repeat the command "
        f"with {ways}"
    )


@contextmanager
def rung_below(trainer: QloraTrainer, config: RunConfig, run: RunFolder) -> Iterator[None]:
    """Name and record the next rung when memory runs out in the middle of a run, for the next time.

    Raises:
        TrainingError: memory ran out; the checkpoints are whole.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    else:
        return
    step = trainer.state.global_step + 1
    where = f"step {step}: out of memory ({reason}); the last checkpoint is whole"
    if lower_token_budget(run, reason):
        raise TrainingError(f"{where}; repeat the command: the run resumes with smaller micro-batches")
    smaller = next_fallback(trainer.config.train, _able(trainer))
    if smaller is None:
        raise TrainingError(f"{where}; {NOTHING_SMALLER}")
    changes = as_overrides(changed_settings(config.train, smaller))
    record_fitted_settings(run, config.train, smaller, f"step {step}: {reason}")
    how = "" if config.train.auto_find_batch_size else f" with {AUTO_FIT}"
    raise TrainingError(f"{where}; repeat the command{how}: the run goes on with {changes}")


def _able(trainer: QloraTrainer) -> Capabilities:
    return Capabilities(
        on_gpu=trainer.adapted.loaded.device.type == "cuda",
        recomputes=trainer.adapted.loaded.model.supports_gradient_checkpointing,
        recomputes_all=trainer.args.gradient_checkpointing or trainer.recomputation.keeps_inputs_alone,
    )


def _with(config: RunConfig, train: TrainSection) -> RunConfig:
    return config.model_copy(update={"train": train})
