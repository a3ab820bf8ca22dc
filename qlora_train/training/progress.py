"""What a person sees of a running training, and metrics.jsonl.

At every log point a line of the log says step, loss, learning rate, gradient norm, tokens a second, GPU memory and the time
left. With a terminal, a live line under the log shows the last loss, the step and the time left as well.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback

from qlora_train.objectives.router_loss import ROUTER_AUX_LOSS
from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io

logger = logging.getLogger(__name__)

_SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad {:.3f}",
    ROUTER_AUX_LOSS: "balance {:.3f}",
}
_KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm", ROUTER_AUX_LOSS, "eval_runtime_seconds")


class Progress(TrainerCallback):
    """Writes a line of metrics at every log point, to the log and to metrics.jsonl."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._bar: Bar | None = None
        self._has_begun = False
        self._start_seconds, self._start_step, self._start_tokens = time.perf_counter(), 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Write the metrics of the steps that a resumed run has behind it, and start the live line."""
        self.rewrite_metrics(state.log_history)
        self._has_begun = True
        self._start_seconds = time.perf_counter()
        self._start_step, self._start_tokens = state.global_step, int(state.num_input_tokens_seen)
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)
            self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Move the live line."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_k: Any) -> None:
        """Write the metrics."""
        metrics = {key: value for key, value in (logs or {}).items() if key in _KEPT}
        if not metrics:
            return
        atomic_io.append_line(
            self._run.metrics_file, _line({"step": state.global_step, "epoch": state.epoch, **metrics})
        )
        parts = [text.format(metrics[key]) for key, text in _SHOWN.items() if key in metrics]
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=f"{parts[0]}  {self._speed(state):.0f} tokens/s")
        logger.info("step %d/%d  %s  %s", state.global_step, state.max_steps, "  ".join(parts), self._resources(state))

    def stop(self) -> None:
        """Take the live line away, however training ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def since_last_start(self, state: Any) -> dict[str, float]:
        """Return the steps, tokens and seconds of training since the process began, or resumed, the run."""
        if not self._has_begun:
            return {"num_steps": 0, "num_tokens": 0, "train_seconds": 0.0}
        return {
            "num_steps": state.global_step - self._start_step,
            "num_tokens": int(state.num_input_tokens_seen) - self._start_tokens,
            "train_seconds": time.perf_counter() - self._start_seconds,
        }

    def _speed(self, state: Any) -> float:
        """Return tokens a second, padding not counted, since this part of the run began."""
        seconds = time.perf_counter() - self._start_seconds
        return float(state.num_input_tokens_seen - self._start_tokens) / seconds

    def _resources(self, state: Any) -> str:
        seconds = time.perf_counter() - self._start_seconds
        left = seconds / max(state.global_step - self._start_step, 1) * (state.max_steps - state.global_step)
        memory = f"  {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if torch.cuda.is_available() else ""
        return f"{self._speed(state):.0f} tokens/s{memory}  {left:.0f} s left"

    def rewrite_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Make metrics.jsonl what the history of a checkpoint says: nothing twice, nothing of a course that was left."""
        lines = [_line(entry) for entry in history if entry.keys() & set(_KEPT)]
        atomic_io.write_text(self._run.metrics_file, "".join(line + "\n" for line in lines))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps({key: entry[key] for key in ("step", "epoch", *_KEPT) if key in entry})
