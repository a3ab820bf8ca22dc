"""A trainer whose worst-case batch fits: with the settings of the config, or with the first memory fallback that does."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qlora_train.config import RunConfig
from qlora_train.config.memory_fallbacks import Capabilities, as_overrides, changed_settings, next_fallback
from qlora_train.config.schema import TrainSection
from qlora_train.kernels.checkpointing_levels import plan_levels
from qlora_train.kernels.fsdp_units import is_sharded
from qlora_train.parallel import context
from qlora_train.runs import RunFolder, apply_fitted_settings, record_fitted_settings
from qlora_train.training.memory.activation_checkpointing import saved_bytes
from qlora_train.training.memory.memory_probe import MemoryProbe, forward_worst_case, probe_memory
from qlora_train.training.padding_free import has_raised_budget, lower_token_budget
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.utils.device import catch_out_of_memory, spare_bytes
from qlora_train.utils.errors import TrainingError, first_line, is_out_of_memory

logger = logging.getLogger(__name__)

BUDGET_SHARES = (1.0, 0.75, 0.5)
"""Shares of the free memory that layers may save, tried in order."""
AUTO_FIND = "train.auto_find_batch_size=true"
NOTHING_SMALLER = (
    "no smaller setting is left; lower data.max_length or lora.r, use a smaller model, or free memory that others use"
)
MORE_PROCESSES = "or start more processes: each then holds less of the base"


def fitting_trainer(make: Callable[[RunConfig], QloraTrainer], config: RunConfig, run: RunFolder) -> QloraTrainer:
    """Return a trainer whose worst-case batch was probed and fits.

    Raises:
        TrainingError: the settings of the config do not fit; names those that do, if any. With a sharded base, names
            those to try next.
    """
    train = recorded = _recorded_settings(config, run)
    if recorded != config.train:
        logger.warning("memory: fitted settings %s (%s)", _changes(config.train, recorded), run.fitted_settings_file)
    trainer = make(_with(config, train))
    with record_fallback(trainer, config, run, "memory probe"):
        first = probe = probe_memory(trainer)
    problem = probe.problem or _fragmentation_problem(trainer, probe)
    if problem is not None and _on_main(lambda: lower_token_budget(run, problem)):
        return fitting_trainer(make, config, run)
    while probe.problem is not None:
        smaller = next_fallback(train, _capabilities(trainer))
        if smaller is None:
            raise TrainingError(f"out of memory: {probe.batch} does not fit ({probe.problem}); {NOTHING_SMALLER}")
        logger.warning("memory: %s does not fit; trying %s", probe.batch, _changes(train, smaller))
        train = smaller
        trainer = make(_with(config, train))
        probe = probe_memory(trainer)
    if train != recorded:
        _accept_or_refuse(config, run, train, first)
    relaxes = train.gradient_checkpointing == "auto" and not train.activation_offloading
    if probe.peak_bytes is not None and relaxes and is_sharded(trainer.model):
        logger.info("gradient_checkpointing: full (under fsdp a try of less could end the run)")
    elif probe.peak_bytes is not None and relaxes:
        probe = relax_checkpointing(trainer, probe, _spare_bytes(trainer, probe))
        checkpoints = set(trainer.layer_checkpointing.levels) != {"none"}
        less_first = "less recomputation comes first"
        if checkpoints and _on_main(lambda: not run.has_begun() and lower_token_budget(run, less_first)):
            return fitting_trainer(make, config, run)
    peak = "" if probe.peak_bytes is None else f" (peak {probe.peak_bytes / 1e9:.1f} GB)"
    logger.info("memory: %s fits%s", probe.batch, peak)
    return trainer


def relax_checkpointing(trainer: QloraTrainer, probe: MemoryProbe, budget_bytes: float) -> MemoryProbe:
    """Let layers recompute less as far as memory allows, and return the last probe that fits.

    Args:
        trainer: with full checkpointing.
        probe: of full checkpointing; it fits.
        budget_bytes: for the activations of all layers, beyond full checkpointing.
    """
    layers = trainer.layer_checkpointing
    if not layers.supports("full"):
        return probe
    saved, problem = catch_out_of_memory(
        lambda: saved_bytes(trainer.model, layers, lambda: forward_worst_case(trainer))
    )
    for share in BUDGET_SHARES if context().all_true(saved is not None) else ():
        assert saved is not None
        layers.set(plan_levels(saved, layers.recompute_cost, share * budget_bytes))
        relaxed = probe_memory(trainer)
        problem = relaxed.problem or _fragmentation_problem(trainer, relaxed)
        if problem is None:
            logger.info("gradient_checkpointing: %s", layers.summary())
            return relaxed
    layers.set("full")
    logger.warning("gradient_checkpointing: full (anything less did not fit: %s)", problem)
    return probe


def _fragmentation_problem(trainer: QloraTrainer, probe: MemoryProbe) -> str | None:
    """Return a message if a batch that fits once leaves too little memory for fragmentation."""
    spare = _spare_bytes(trainer, probe)
    return None if spare >= 0 else f"{-spare / 1e9:.1f} GB short for fragmentation"


def _spare_bytes(trainer: QloraTrainer, probe: MemoryProbe) -> int:
    """Return the bytes that a probe leaves on the rank with the least; 0 on a CPU."""
    device, peak_bytes = trainer.adapted.loaded.device, probe.peak_bytes
    return min(context().gather(0 if peak_bytes is None else spare_bytes(device, peak_bytes)))


def _on_main(decide: Callable[[], bool]) -> bool:
    """Return what rank 0 decides, which alone changes the run folder."""
    return context().broadcast(context().is_main and decide())


def _recorded_settings(config: RunConfig, run: RunFolder) -> TrainSection:
    """Return the settings of the config, or those that an earlier start fitted, as rank 0 reads them."""
    if not config.train.auto_find_batch_size:
        return config.train
    return context().broadcast(apply_fitted_settings(run, config.train) if context().is_main else config.train)


def _accept_or_refuse(config: RunConfig, run: RunFolder, fitted: TrainSection, first: MemoryProbe) -> None:
    changes = _changes(config.train, fitted)
    if context().is_main:
        record_fitted_settings(run, config.train, fitted, f"{first.batch} did not fit: {first.problem}")
    if config.train.auto_find_batch_size:
        logger.warning("memory: %s did not fit; training with %s", first.batch, changes)
        return
    options = (
        f"{AUTO_FIND}, which uses these" if run.has_begun() else f"these settings, or {AUTO_FIND}, which uses them"
    )
    raise TrainingError(
        f"out of memory: {first.batch} does not fit ({first.problem}); these settings fit: {changes}; repeat the command "
        f"with {options}"
    )


@contextmanager
def record_fallback(
    trainer: QloraTrainer, config: RunConfig, run: RunFolder, stage: str | None = None
) -> Iterator[None]:
    """If the block runs out of memory, record the next fallback, which the next start uses.

    All ranks enter together. Each that runs out of memory records, as it may be the only one; ranks record the same.

    Args:
        stage: what runs, for the message; None: the step.

    Raises:
        TrainingError: out of memory; checkpoints are complete.
    """
    has_raised = _on_main(lambda: has_raised_budget(run))  # here, as another rank may lower it before this one does
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    else:
        return
    stage = stage or f"step {trainer.state.global_step + 1}"
    what = f"{stage}: out of memory ({reason}); complete checkpoints are intact"
    more = f"; {MORE_PROCESSES}" if is_sharded(trainer.model) else ""
    if has_raised:
        lower_token_budget(run, reason)
        raise TrainingError(f"{what}; repeat the command: the run resumes with smaller micro-batches{more}")
    smaller = next_fallback(trainer.config.train, _capabilities(trainer))
    if smaller is None:
        raise TrainingError(f"{what}; {NOTHING_SMALLER}{more}")
    record_fitted_settings(run, config.train, smaller, f"{stage}: {reason}")
    how = "" if config.train.auto_find_batch_size else f" with {AUTO_FIND}"
    changes = _changes(config.train, smaller)
    raise TrainingError(f"{what}; repeat the command{how}: the run resumes with {changes}{more}")


def _capabilities(trainer: QloraTrainer) -> Capabilities:
    return Capabilities(
        on_gpu=trainer.adapted.loaded.device.type == "cuda",
        can_checkpoint=trainer.adapted.loaded.model.supports_gradient_checkpointing,
        checkpoints_all=trainer.args.gradient_checkpointing or trainer.layer_checkpointing.is_full,
    )


def _changes(before: TrainSection, after: TrainSection) -> str:
    return as_overrides(changed_settings(before, after))


def _with(config: RunConfig, train: TrainSection) -> RunConfig:
    return config.model_copy(update={"train": train})
