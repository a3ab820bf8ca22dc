"""SFTTrainer with checkpoints that are complete or absent, contain no pickle, and resume a run bitwise on a CPU.

Rank 0 writes them; they do not depend on the number of processes, except for random states.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from trl import SFTTrainer

from qlora_train.adapters import trainable_state
from qlora_train.config import RunConfig
from qlora_train.parallel import context
from qlora_train.runs import RunFolder
from qlora_train.runs.random_states import restore_rank_random_state, save_random_states
from qlora_train.runs.training_state import checkpoint_errors, load_parameters, load_tree, random_state, save_tree
from qlora_train.training.batch_source import BatchSource
from qlora_train.training.lr_schedule import fast_forward
from qlora_train.training.metric_means import MetricMeans
from qlora_train.training.optimizer import page_restored_state
from qlora_train.training.replicas import check_replicas
from qlora_train.training.run_clock import RunClock
from qlora_train.training.step_end import Schedule, best_step, evaluations
from qlora_train.training.step_guard import NonFiniteGuard, check_finite
from qlora_train.utils import atomic_io, signals
from qlora_train.utils.errors import CheckpointError

STATE_FILE = "trainer_state.json"
RESERVED_SAVES = 3
"""Time reserved before the end of `run.max_minutes`, in durations of the slowest checkpoint."""


class ResumableTrainer(SFTTrainer):
    """SFTTrainer with this project's checkpoints; subclasses set the attributes below before `train`."""

    config: RunConfig
    run: RunFolder
    batch_source: BatchSource
    guard: NonFiniteGuard
    schedule: Schedule
    optimizer: Any  # None before training
    lr_scheduler: LambdaLR | None
    _tr_loss: torch.Tensor  # sum of the losses since the last log line
    _globalstep_last_logged: int
    _step_loss: torch.Tensor | None  # of the current optimizer step
    _metric_means: MetricMeans
    clock: RunClock

    def is_finished(self) -> bool:
        """Return whether no step is left."""
        return self.schedule.is_finished(self.state.global_step, self.state.log_history)

    def has_pending_evaluation(self) -> bool:
        """Return whether a stop skipped the evaluation after the last step."""
        step = self.state.global_step
        return self.schedule.evaluates_after(step) and step not in evaluations(self.state.log_history)

    def save(self) -> None:
        """Write a checkpoint of the last step, then delete old ones."""
        assert self._step_loss is None, "this release of transformers skips `_get_grad_norm`"
        started = time.perf_counter()
        step, trained = self.state.global_step, dict(trainable_state(self.model))
        check_finite(step, trained, self.optimizer.state)
        check_replicas(step, trained)
        random_states, loop = context().gather(random_state()), self._loop_state()
        if context().is_main:
            with atomic_io.atomic_folder(self.run.checkpoint(step), self.run.checkpoint_metadata(step)) as folder:
                save_tree(folder, "adapter", trained)
                save_tree(folder, "optimizer", self.optimizer.state_dict())
                save_random_states(folder, random_states)
                save_tree(folder, "loop", loop)
                atomic_io.write_file(folder / STATE_FILE, lambda path: self.state.save_to_json(str(path)))
            best = best_step(self.state.log_history) if self.config.train.load_best_model_at_end else None
            self.run.rotate(keep=self.config.train.save_total_limit, best=best)
        context().barrier()
        signals.reserve_time(RESERVED_SAVES * (time.perf_counter() - started))

    def run_pending_evaluation(self, checkpoint: Path) -> None:
        """Run the evaluation that a stop skipped, and add its result to the checkpoint."""
        with self.accelerator.autocast():  # as inside the training loop
            self.evaluate()
        if context().is_main:
            with atomic_io.atomic_folder(checkpoint, atomic_io.read_metadata(checkpoint)) as folder:
                for file in checkpoint.iterdir():
                    if file.name not in (STATE_FILE, atomic_io.MANIFEST):
                        shutil.copyfile(file, folder / file.name)
                atomic_io.write_file(folder / STATE_FILE, lambda path: self.state.save_to_json(str(path)))
        context().barrier()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with self.clock.saving():
            self.save()

    def _loop_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "tr_loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "guard": self.guard.state(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "batch_source": self.batch_source.state(),
            "metric_means": self._metric_means.state(),
            "clock": self.clock.state(),
        }

    def restore(self, checkpoint: Path) -> None:
        """Restore the adapter and the trainer state, which tell what is left to do; `train` restores the rest."""
        self._load_from_checkpoint(str(checkpoint))
        self.clock.restore(
            load_tree(checkpoint, "loop")["clock"]
        )  # once: `train` loads again, after a pending evaluation
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        if self.state.global_step != atomic_io.read_metadata(checkpoint)["step"]:
            raise ValueError(f"{STATE_FILE} is that of step {self.state.global_step}")

    def load_adapter(self, step: int) -> None:
        """Load the adapter of one of this run's checkpoints."""
        folder, problem = self.run.checkpoint(step), self.run.checkpoint_problem(step)
        if problem is not None:
            raise CheckpointError(f"{folder}: the best checkpoint is damaged: {problem}; restore it, or train again")
        load_parameters(trainable_state(self.model), load_tree(folder, "adapter"), str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with checkpoint_errors(folder):
            load_parameters(trainable_state(self.model), load_tree(folder, "adapter"), str(folder))
            loop = load_tree(folder, "loop")
            self.guard.restore(loop["guard"])
            self.batch_source.restore(loop["batch_source"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore the optimizer's state; hyperparameters come from the config, the learning rate from the step."""
        if checkpoint is None:
            return
        with checkpoint_errors(Path(checkpoint)):
            stored = load_tree(Path(checkpoint), "optimizer")
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": stored["state"]})
            page_restored_state(self.optimizer)
        assert self.lr_scheduler is not None
        fast_forward(self.lr_scheduler, self.state.global_step)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            with checkpoint_errors(Path(checkpoint)):
                self.accelerator.scaler.load_state_dict(load_tree(Path(checkpoint), "loop")["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random states, and the counters of the loop that the Trainer resets before it calls this."""
        if checkpoint is None:
            return
        with checkpoint_errors(Path(checkpoint)):
            restore_rank_random_state(Path(checkpoint), seed=self.config.run.seed, step=self.state.global_step)
            loop = load_tree(Path(checkpoint), "loop")
            self._tr_loss = loop["tr_loss"].to(self.args.device)
            self._total_loss_scalar, self._globalstep_last_logged = loop["total_loss"], loop["last_logged"]
            self._metric_means.restore(loop["metric_means"])
