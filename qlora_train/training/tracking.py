"""Experiment trackers: the callbacks of Transformers, named after the run; a tracker that fails never ends the run."""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qlora_train.config import RunConfig
from qlora_train.parallel import context
from qlora_train.runs import RunFolder
from qlora_train.utils import network
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

    Checkpoints are not passed on: uploads of them are refused before a run.

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
        self._pass_on("on_train_end", args, state, control, **keywords)

    def _pass_on(self, event: str, *arguments: Any, **keywords: Any) -> None:
        if self._fails:
            return
        try:
            with _quiet():
                getattr(self._callback, event)(*arguments, **keywords)
        except Exception as error:
            self._fails = True
            logger.warning(
                "run.report_to: %s failed and is off until the run resumes (%s); metrics.jsonl is complete",
                self._name, _reason(error),
            )  # fmt: skip


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
