"""The number of steps of a run with `train.minutes`: from a trial of optimizer steps before the first one.

It is recorded in the run folder: a resumed run has the same number of steps, and so the same learning-rate schedule.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import TrainerState

from qlora_train.adapters import trainable_state
from qlora_train.config import RunConfig
from qlora_train.data.token_store import Rows
from qlora_train.parallel import context
from qlora_train.parallel.shared_stop import shared_stop
from qlora_train.runs import RunFolder, read_json, write_json
from qlora_train.training.parity.preserve_state import preserve_model_state
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.training.resumable_trainer import STATE_FILE
from qlora_train.utils import signals
from qlora_train.utils.errors import CheckpointError, TrainingError

logger = logging.getLogger(__name__)

NUM_WARMUP_STEPS = 1
"""Steps of the trial that are not timed: the first one compiles kernels and fills caches."""
MIN_TIMED_STEPS, MAX_TIMED_STEPS = 3, 32
TRIAL_SHARE = 0.03
"""The trial ends after this share of `train.minutes`, when it has MIN_TIMED_STEPS."""
NUM_EVAL_ROWS = 32
"""Held-out rows that are timed."""
RESERVED_SHARE = 0.02
"""Share of the time that is left for checkpoints, and for steps slower than those of the trial."""


@dataclass(frozen=True)
class StepTimes:
    """Measurements of a trial.

    Attributes:
        step_seconds: expected seconds of an optimizer step of the run.
        eval_seconds: expected seconds of an evaluation and of its samples; 0 without held-out rows.
        trial_seconds: duration of the trial, and of the samples before the first step.
    """

    step_seconds: float
    eval_seconds: float
    trial_seconds: float


def with_recorded_steps(config: RunConfig, run: RunFolder, resume_from: Path | None) -> RunConfig:
    """Return a config whose `train.max_steps` is the recorded number of steps, or, without one, that of the trial.

    Raises:
        CheckpointError: the number of a run that resumes was not recorded.
    """
    minutes = config.train.minutes
    if minutes is None:
        return config
    recorded = context().broadcast(read_json(run.num_steps_file) if context().is_main else {})
    num_steps = recorded.get("num_steps") if recorded.get("minutes") == minutes else None
    if resume_from is not None and not recorded:
        before = TrainerState.load_from_json(str(resume_from / STATE_FILE)).max_steps
        raise CheckpointError(
            f"{run.num_steps_file}: missing; the run has {before} steps: write "
            f"{json.dumps({'minutes': minutes, 'num_steps': before})} into it, or start a new run"
        )
    return _with_max_steps(config, num_steps or NUM_WARMUP_STEPS + MAX_TIMED_STEPS)


def fix_num_steps(trainer: QloraTrainer, config: RunConfig, run: RunFolder) -> None:
    """Time a trial, set the number of steps so that training ends after `train.minutes`, and record it.

    Does nothing if the config does not ask for it, or if the number is recorded.

    Raises:
        TrainingError: the time is too short for one step.
    """
    minutes = config.train.minutes
    if minutes is None:
        return
    recorded = context().broadcast(read_json(run.num_steps_file) if context().is_main else {})
    if recorded.get("minutes") == minutes:
        return
    times = context().broadcast(time_trial(trainer, 60 * minutes))
    num_steps = affordable_steps(times, 60 * minutes, _eval_period(trainer))
    if num_steps < 1:
        needed = (times.trial_seconds + times.step_seconds + times.eval_seconds) / (1 - RESERVED_SHARE) / 60
        raise TrainingError(
            f"train.minutes: {minutes:g} is too short: trial, one step and its evaluation take {needed:.2g}; raise it, or "
            "set train.max_steps"
        )
    trainer.set_num_steps(num_steps)
    if context().is_main:
        write_json(run.num_steps_file, {"minutes": minutes, "num_steps": num_steps, **vars(times)})
    logger.info(
        "train.minutes: %d steps (trial of %.0f s: %.3g s a step, %.3g s an evaluation)",
        num_steps, times.trial_seconds, times.step_seconds, times.eval_seconds,
    )  # fmt: skip


def affordable_steps(times: StepTimes, seconds: float, eval_period: float | None) -> int:
    """Return the steps that end in time with an evaluation every `eval_period` steps and one at the end."""
    left = (seconds - times.trial_seconds) * (1 - RESERVED_SHARE) - (times.eval_seconds if eval_period else 0)
    return math.floor(left / (times.step_seconds + (times.eval_seconds / eval_period if eval_period else 0)))


def time_trial(trainer: QloraTrainer, seconds: float) -> StepTimes:
    """Run optimizer steps on the first rows and evaluate some held-out rows; the run is left as it was.

    Args:
        seconds: time of the whole run; the trial takes TRIAL_SHARE of it, or as long as MIN_TIMED_STEPS take.

    Raises:
        Stop: a signal asked the process to stop.
    """
    started = time.perf_counter()
    timed: list[tuple[float, int]] = []
    with _preserve_run(trainer):
        for step in islice(_steps(trainer), NUM_WARMUP_STEPS + MAX_TIMED_STEPS):
            if shared_stop():
                signals.raise_if_requested()
            timed.append(step)
            has_enough = len(timed) >= NUM_WARMUP_STEPS + MIN_TIMED_STEPS
            if context().broadcast(has_enough and time.perf_counter() - started > TRIAL_SHARE * seconds):
                break
        sample_seconds = _sample_seconds(trainer)
        eval_seconds = _evaluation_seconds(trainer) + sample_seconds
    timed = timed[NUM_WARMUP_STEPS:] or timed
    per_token = sum(seconds for seconds, _ in timed) / sum(num_tokens for _, num_tokens in timed)
    tokens_per_step = _mean_step_tokens(trainer) or sum(num_tokens for _, num_tokens in timed) / len(timed)
    trial_seconds = time.perf_counter() - started + sample_seconds  # answers before the first step
    return StepTimes(per_token * tokens_per_step, eval_seconds, trial_seconds)


@contextmanager
def _preserve_run(trainer: QloraTrainer) -> Iterator[None]:
    """Restore adapter, random states and the trainer's own state."""
    weights = trainable_state(trainer.model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with preserve_model_state(trainer.accelerator.prepare_model(trainer.model)):
            yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(before[name])
        trainer.forget_steps()


def _steps(trainer: QloraTrainer) -> Iterator[tuple[float, int]]:
    """Run optimizer steps; yield the seconds and tokens of each."""
    model = trainer.accelerator.prepare_model(trainer.model)
    optimizer, weights = trainer.create_optimizer(), list(trainable_state(trainer.model).values())
    while True:  # epochs
        for batches in trainer.get_train_dataloader():
            started = time.perf_counter()
            loss, num_tokens = trainer.compute_gradients(model, batches)
            torch.nn.utils.clip_grad_norm_(weights, trainer.config.train.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            float(loss)  # waits for the GPU
            yield time.perf_counter() - started, num_tokens


def _evaluation_seconds(trainer: QloraTrainer) -> float:
    """Return the expected seconds of an evaluation, from that of some held-out rows; 0 without any."""
    rows = trainer.examples.eval
    if not rows:
        return 0.0
    timed = [rows[index] for index in range(0, len(rows), math.ceil(len(rows) / NUM_EVAL_ROWS))]
    started = time.perf_counter()
    trainer.measure(timed)
    seconds = time.perf_counter() - started
    return seconds * sum(row.num_tokens for row in rows) / sum(row.num_tokens for row in timed)


def _sample_seconds(trainer: QloraTrainer) -> float:
    """Return the seconds of the answers that `run.samples` asks for at every evaluation."""
    if not trainer.config.run.samples:
        return 0.0
    from qlora_train.training.held_out_samples import SampleCallback

    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, SampleCallback)]
    return sum(callback.measure_seconds(trainer.model) for callback in callbacks)


def _mean_step_tokens(trainer: QloraTrainer) -> float | None:
    """Return the mean tokens of an optimizer step; None for a stream."""
    rows, steps_per_epoch = trainer.examples.train, trainer.batch_source.steps_per_epoch
    return None if steps_per_epoch is None or not isinstance(rows, Rows) else int(rows.lengths.sum()) / steps_per_epoch


def _eval_period(trainer: QloraTrainer) -> float | None:
    """Return the steps between evaluations; None without any."""
    if not trainer.examples.eval:
        return None
    return trainer.config.train.eval_steps or trainer.batch_source.steps_per_epoch


def _with_max_steps(config: RunConfig, max_steps: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"max_steps": max_steps})})
