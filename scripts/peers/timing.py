"""What every peer of `scripts/bench.py` is measured with: steps, tokens that are not padding, memory, gradients, losses."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Timing(TrainerCallback):
    """Times optimizer steps from the end of one to the end of the next; the first of them only warms up."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self._begun = time.perf_counter()

    def counted(self, collate: Any) -> Any:
        """Return a collator that counts the tokens of every batch it makes."""

        def collate_and_count(rows: Any) -> Any:
            batch = collate(rows)
            self.tokens.append(int(batch["attention_mask"].sum()))
            return batch

        return collate_and_count

    def on_step_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_keywords: Any) -> None:
        """Note loss and gradient norm."""
        logs = logs or {}
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs.get("grad_norm", "nan")))

    def write(self, file: Path) -> None:
        """Write what was measured."""
        seconds = [end - begin for begin, end in zip(self.ends, self.ends[1:], strict=False)]
        content = {
            "tokens": self.tokens[1 : len(self.ends)],
            "seconds": seconds,
            "first_step_seconds": self.ends[0] - self._begun,
            "losses": self.losses,
            "grad_norms": self.norms,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            "threads": torch.get_num_threads(),
        }
        file.write_text(json.dumps(content))


def settings_of(arguments: list[str]) -> tuple[dict[str, Any], Path]:
    """Return the settings and the file for the result from a peer's two arguments."""
    settings: dict[str, Any] = json.loads(Path(arguments[0]).read_text())
    return settings, Path(arguments[1])
