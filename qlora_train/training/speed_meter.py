"""Tokens per second of the optimizer steps since the last log line, and the peak of memory so far."""

import resource
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback

TOKENS_PER_SECOND, PEAK_MEMORY_BYTES = "tokens_per_second", "peak_memory_bytes"
"""Metrics of a training log line."""
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


class SpeedMeter(TrainerCallback):
    """Adds up the time of optimizer steps: evaluations, checkpoints and the time between processes do not count."""

    def __init__(self) -> None:
        self._step_started = self._seconds = 0.0
        self._num_tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        self._seconds, self._num_tokens = 0.0, int(state.num_input_tokens_seen)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        self._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        self._seconds += time.perf_counter() - self._step_started

    def take(self, num_tokens: int) -> dict[str, float]:
        """Return the metrics up to the run's `num_tokens`-th token, and begin anew."""
        speed = (num_tokens - self._num_tokens) / max(self._seconds, 1e-9)
        self._seconds, self._num_tokens = 0.0, num_tokens
        return {TOKENS_PER_SECOND: round(speed, 2), PEAK_MEMORY_BYTES: peak_memory_bytes()}


def peak_memory_bytes() -> int:
    """Return the peak of GPU memory that this process's tensors held; on a CPU, of all memory of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES
