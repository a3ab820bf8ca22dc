"""Runs whose processes a launcher has started: find them, wait for their checkpoints, compare their adapters."""

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from qlora_train.config.writer import to_yaml
from qlora_train.runs import RunFolder
from tests.support.runs import make_config

NUM_STEPS = 32
SETTINGS = (
    f"train.max_steps={NUM_STEPS}", "train.save_steps=4", "train.learning_rate=1e-3", "train.logging_steps=20",
    "data.eval=0.1", "quantization.bnb_4bit_compute_dtype=float32",
)  # fmt: skip
"""Of runs that are killed between checkpoints."""
TIMEOUT_SECONDS = 240


@dataclass
class LaunchedRun:
    """A run that several processes train.

    Attributes:
        config: its file, which names its processes.
    """

    config: Path
    folder: RunFolder

    def processes(self) -> dict[int, psutil.Process]:
        """Return the processes that train, by rank."""
        ranks = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, StopIteration):
                words, environment = process.cmdline(), process.environ()
                if "qlora_train.cli.main" in words and str(self.config) in words:
                    ranks[int(next(environment[name] for name in ("RANK", "SLURM_PROCID") if name in environment))] = (
                        process
                    )
        return dict(sorted(ranks.items()))

    def wait_for_step(self, step: int, launcher: subprocess.Popen[str]) -> None:
        """Wait until the checkpoint of a step is complete, or a later one."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while max(self.folder.checkpoint_steps(), default=0) < step:
            assert launcher.poll() is None, launcher.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)


def write_run(folder: Path, base: Path, *overrides: str, name: str = "run") -> LaunchedRun:
    """Write the config of a run with frequent checkpoints."""
    config = make_config(folder, base, *SETTINGS, *overrides, name=name)
    file = folder / f"{name}.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    return LaunchedRun(file, RunFolder(folder / name))


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command; its output is one stream of text."""
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | environment
    )


def output(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a command and return its output."""
    return process.communicate(timeout=TIMEOUT_SECONDS)[0]


def adapter_distance(run: RunFolder, other: RunFolder) -> float:
    """Return the norm of the difference of two finished adapters, relative to the second."""
    one, two = (
        torch.cat([value.flatten() for value in load_file(each.adapter / "adapter_model.safetensors").values()])
        for each in (run, other)
    )
    return float(torch.linalg.vector_norm(one - two) / torch.linalg.vector_norm(two))
