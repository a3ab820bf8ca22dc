"""Speed of the optimizer steps since the last log line, in tokens per second and as MFU, and the peak of memory so far."""

import resource
import sys
from typing import Any

import torch
from transformers import TrainerCallback

from qlora_train.training.flops_utilization import Utilization
from qlora_train.training.run_clock import RunClock
from qlora_train.utils.memory_meter import gpu_peak_bytes

TOKENS_PER_SECOND, MFU, PEAK_MEMORY_BYTES = "tokens_per_second", "mfu", "peak_memory_bytes"
"""Metrics of a training log line."""
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


class SpeedMeter(TrainerCallback):
    """Measures the speed of optimizer steps: evaluations, checkpoints and the time between processes do not count.

    Args:
        clock: the run's, which comes before this callback.
        utilization: what turns tokens and labels into MFU; None: it is unknown.
    """

    def __init__(self, clock: RunClock, utilization: Utilization | None = None) -> None:
        self._clock, self._utilization = clock, utilization
        self._seconds = 0.0
        self._num_tokens = self._num_labels = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        self._begin(int(state.num_input_tokens_seen))

    def count_labels(self, num_labels: int) -> None:
        """Count the label tokens of a step."""
        self._num_labels += num_labels

    def take(self, num_tokens: int) -> dict[str, float]:
        """Return the metrics up to the run's `num_tokens`-th token, and begin anew."""
        tokens, labels = num_tokens - self._num_tokens, self._num_labels
        seconds = max(self._clock.step_seconds - self._seconds, 1e-9)
        self._begin(num_tokens)
        metrics = {TOKENS_PER_SECOND: round(tokens / seconds, 2)}
        if self._utilization is not None:
            metrics[MFU] = round(self._utilization.mfu(tokens, labels, seconds), 4)
        return {**metrics, PEAK_MEMORY_BYTES: peak_memory_bytes()}

    def _begin(self, num_tokens: int) -> None:
        self._seconds, self._num_tokens, self._num_labels = self._clock.step_seconds, num_tokens, 0


def peak_memory_bytes() -> int:
    """Return the peak of this process's GPU memory, with the CUDA context; on a CPU, of all memory of the process."""
    if torch.cuda.is_available():
        return gpu_peak_bytes(torch.device("cuda", 0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES
