"""Return the memory of freed tensors to the system every few optimizer steps."""

from typing import Any

from transformers import TrainerCallback

from qlora_train.utils.cpu_memory import return_freed_memory

STEPS_BETWEEN = 8
"""Every step would take about 6 % more time on a CPU, for page faults."""


class TrimHeapCallback(TrainerCallback):
    """Trims the heap before the first step that this process takes, and before every STEPS_BETWEEN-th of the run."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        return_freed_memory()  # of the parity checks and the memory probe

    def on_step_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        if state.global_step % STEPS_BETWEEN == 0:
            return_freed_memory()
