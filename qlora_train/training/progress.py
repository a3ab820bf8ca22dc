"""Training progress: an event per step; a log line, an event and a line of metrics.jsonl at every log point."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from qlora_train.objectives.router_loss import ROUTER_AUX_LOSS
from qlora_train.parallel import context
from qlora_train.runs import RunFolder
from qlora_train.training.run_clock import RunClock
from qlora_train.training.speed_meter import MFU, PEAK_MEMORY_BYTES, TOKENS_PER_SECOND
from qlora_train.utils import atomic_io
from qlora_train.utils.memory_meter import gpu_peak_bytes
from qlora_train.utils.run_events import Measured, Restored, StepEnded, emit

logger = logging.getLogger(__name__)

LOG_FORMATS = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad {:.3f}",
    ROUTER_AUX_LOSS: "router {:.3f}",
}
"""Metrics of every objective, and how a log line prints them."""


class ProgressCallback(TrainerCallback):
    """Writes metrics to the log and, on rank 0, to metrics.jsonl.

    Attributes:
        clock: of the run; the trainer keeps it.

    Args:
        objective_formats: how log lines print the objective's own metrics; empty: not at all.
    """

    def __init__(self, run: RunFolder, objective_formats: Mapping[str, str]) -> None:
        self._run = run
        self._formats = {**LOG_FORMATS, **objective_formats}
        self._metrics = (*self._formats, TOKENS_PER_SECOND, MFU, PEAK_MEMORY_BYTES, "eval_runtime_seconds")
        self._writes = context().is_main
        self.clock = RunClock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Write the metrics of earlier steps."""
        self.rewrite_metrics(state.log_history)
        emit(StepEnded(state.global_step, state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        emit(StepEnded(state.global_step, state.max_steps))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_k: Any) -> None:
        metrics = {key: value for key, value in (logs or {}).items() if key in self._metrics}
        if not metrics:
            return
        if self._writes:
            line = self._line({"step": state.global_step, "epoch": state.epoch, **metrics})
            atomic_io.append_line(self._run.metrics_file, line)
        event = self._measured(state, metrics)
        emit(event)
        logger.info("%s", self._log_line(event), extra={"metrics": _fields(event)})

    def _measured(self, state: Any, metrics: Mapping[str, float]) -> Measured:
        return Measured(
            step=state.global_step,
            num_steps=state.max_steps,
            epoch=state.epoch,
            values=metrics,
            seconds_left=self.clock.seconds_left(state.global_step),
            memory_bytes=gpu_peak_bytes(torch.device("cuda", 0)) if torch.cuda.is_available() else None,
        )

    def _log_line(self, event: Measured) -> str:
        values = event.values
        parts = [text.format(values[key]) for key, text in self._formats.items() if text and key in values]
        measured = (
            ("{:.0f} tokens/s", values.get(TOKENS_PER_SECOND)),
            ("mfu {:.1f} %", 100 * values[MFU] if MFU in values else None),
            ("{:.1f} GB", None if event.memory_bytes is None else event.memory_bytes / 1e9),
            ("{:.0f} s left", event.seconds_left),
        )
        speed = [text.format(value) for text, value in measured if value is not None]
        return "  ".join([f"step {event.step}/{event.num_steps}", *parts, *speed])

    def rewrite_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl from a log history, without the lines of steps after its checkpoint; emit it."""
        emit(Restored(tuple(history)))
        if not self._writes:
            return
        lines = [self._line(entry) for entry in history if entry.keys() & set(self._metrics)]
        atomic_io.write_text(self._run.metrics_file, "".join(line + "\n" for line in lines))

    def _line(self, entry: Mapping[str, Any]) -> str:
        return json.dumps({key: entry[key] for key in ("step", "epoch", *self._metrics) if key in entry})


def _fields(event: Measured) -> dict[str, Any]:
    """Return the fields of a JSON log line."""
    fields = {"step": event.step, "num_steps": event.num_steps, "epoch": event.epoch, **event.values}
    if event.seconds_left is not None:
        fields["seconds_left"] = round(event.seconds_left, 1)
    return fields if event.memory_bytes is None else {**fields, "memory_bytes": event.memory_bytes}
