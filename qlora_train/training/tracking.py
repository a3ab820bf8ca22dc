"""Experiment trackers: the callbacks of Transformers, named after the run; a tracker that fails never ends the run."""

import importlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qlora_train.config import RunConfig
from qlora_train.parallel import context
from qlora_train.runs import RunFolder
from qlora_train.utils import network, signals
from qlora_train.utils.errors import TrainingError, first_line
from qlora_train.utils.trackers import TRACKERS, go_offline

logger = logging.getLogger(__name__)

PROJECT = "qlora-train"
"""The project, or experiment, of all runs, unless the tracker's own variable names another."""


def tracker_callbacks(config: RunConfig, run: RunFolder) -> list[TrainerCallback]:
    """Return a callback for each tracker of `run.report_to`, on rank 0."""
    return [TrackerCallback(name, run) for name in config.run.report_to] if context().is_main else []


class TrackerCallback(TrainerCallback):
    """Passes the start, the metrics and the end of training on to a tracker's callback.

    A stop or an error ends the tracker's run too, where the tracker has a state for it: MLflow's KILLED or FAILED, an exit
    code of W&B. Checkpoints are not passed on: uploads of them are refused before a run.

    Raises:
        TrainingError: the tracker cannot start.
    """

    def __init__(self, name: str, run: RunFolder) -> None:
        self._name, self._fails = name, False
        if variable := TRACKERS[name].project_variable:
            os.environ.setdefault(variable, PROJECT)
        if network.is_offline():
            go_offline([name])
        with _start_errors(name):
            self._callback = _make_callback(name, run)

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Start the tracker's run."""
        with _start_errors(self._name):
            self._callback.on_train_begin(args, state, control, **keywords)

    def on_log(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self._pass_on("on_log", args, state, control, **keywords)

    def on_train_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if signals.requested() is not None and state.global_step < state.max_steps:
            self.end_early(args, state, control, failed=False)
        else:
            self._pass_on("on_train_end", args, state, control, **keywords)

    def end_early(self, args: Any, state: Any, control: Any, *, failed: bool) -> None:
        """End the tracker's run before its last step; `failed`: by an error, not by a stop."""
        self._pass_on("on_train_end", args, state, control, end=partial(_end_early, self._name, failed))

    def _pass_on(self, event: str, *arguments: Any, end: Callable[[], None] = lambda: None, **keywords: Any) -> None:
        if self._fails:
            return
        try:
            with _quiet():
                end()
                getattr(self._callback, event)(*arguments, **keywords)
        except Exception as error:
            self._fails = True
            logger.warning(
                "run.report_to: %s failed and is off until the run resumes (%s); metrics.jsonl is complete",
                self._name, _reason(error),
            )  # fmt: skip


def end_trackers_early(trainer: Trainer, *, failed: bool) -> None:
    """End the runs of all trackers after an exception that left the training loop; those that ended are left alone."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrackerCallback):
            callback.end_early(trainer.args, trainer.state, trainer.control, failed=failed)


def _end_early(name: str, failed: bool) -> None:
    """Set the state of a tracker's current run, which its callback would end as finished."""
    if name == "mlflow":
        import mlflow

        mlflow.end_run("FAILED" if failed else "KILLED")
    elif name == "wandb":
        importlib.import_module("wandb").finish(exit_code=1)


def _make_callback(name: str, run: RunFolder) -> TrainerCallback:
    callback: TrainerCallback = INTEGRATION_TO_CALLBACK[name]()
    if name == "tensorboard" and callback.logging_dir is None:  # else TENSORBOARD_LOGGING_DIR
        callback.logging_dir = str(run.path / "tensorboard")
    return callback


@contextmanager
def _start_errors(name: str) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except Exception as error:
        raise TrainingError(
            f"run.report_to: {name} cannot start: {_reason(error)}; mend that, or drop {name}: metrics.jsonl has the same "
            "numbers"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a tracker prints to itself."""
    with redirect_stdout(io.StringIO()):
        yield


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
