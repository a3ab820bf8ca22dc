"""A whole run of this package as a peer of `scripts/bench_preferences.py`: times of steps and the memory of training.

The file of settings has the overrides of a config. The run's own events say when training begins and when each step ends.
"""

import json
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from timing import settings_of

from qlora_train.config import load_config
from qlora_train.pipeline import run
from qlora_train.runs import RunFolder
from qlora_train.utils.device import select_device
from qlora_train.utils.memory_meter import MemoryMeter
from qlora_train.utils.run_events import Event, Restored, StageEnded, StepEnded, listening


class RunTiming:
    """Notes the ends of steps, and how much memory grew from the start of training to the end of its last step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.stages: dict[str, float] = {}
        self.growth_bytes = 0
        self._meter: MemoryMeter | None = None

    def __call__(self, event: Event) -> None:
        """Receive an event of the run."""
        if isinstance(event, Restored):
            self._meter = MemoryMeter(select_device())
        elif isinstance(event, StageEnded):
            self.stages[event.name] = event.seconds
        elif isinstance(event, StepEnded) and event.step and self._meter is not None:
            self.ends.append(time.perf_counter())
            self.growth_bytes = self._meter.peak_bytes()


def measured(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a config in `folder` and return what was measured."""
    (folder / "config.yaml").write_text("export:\n  merge: false\n")
    overrides = [*settings["overrides"], "train.logging_steps=1", f"run.output_dir={folder / 'run'}"]
    timing = RunTiming()
    with listening(timing):
        finished: RunFolder = run(load_config(folder / "config.yaml", overrides))
    lines = [json.loads(line) for line in finished.metrics_file.read_text().splitlines()]
    return {
        "seconds": [end - begin for begin, end in pairwise(timing.ends)],
        "stage_seconds": timing.stages,
        "growth_gb": timing.growth_bytes / 1e9,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "losses": [line["loss"] for line in lines if "loss" in line],
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure one run."""
    settings, result = settings_of(sys.argv[1:])
    with TemporaryDirectory() as folder:
        content = measured(settings, Path(folder))
    result.write_text(json.dumps(content))


if __name__ == "__main__":
    main()
