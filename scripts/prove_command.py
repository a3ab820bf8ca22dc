"""Run the real command on a pico model: train, SIGTERM, resume, merge, eval, and train in float16.

Exit status 1 if a command or a check of its result fails; the others still run where they can.

Example: ``python scripts/prove_command.py build/prove-command``
"""

import argparse
import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import bench_rows
import random_model
from bench_run import watched

from qlora_train.runs import RunFolder

STEPS, STEPS_BEFORE_STOP, FLOAT16_STEPS = 60, 3, 4
STOPPED = 128 + signal.SIGTERM
LENGTH = 256


def main() -> int:
    """Print a line for each check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    random_model.write_model(folder / "model", random_model.SHAPES["pico"], nf4=False, seed=0)
    bench_rows.write_rows(folder / "rows.jsonl", num_rows=120, median=100, longest=LENGTH)
    (folder / "run.yaml").write_text("data:\n  eval: 0.1\n", encoding="utf-8")
    lines = []
    for name, holds in checks(folder):
        lines.append(f"{'ok  ' if holds else 'FAIL'} {name}")
        print(lines[-1], flush=True)
    print("\n".join(lines))
    return 1 if any(line.startswith("FAIL") for line in lines) else 0


def checks(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield what should hold, and whether it does, after each command."""
    run = RunFolder(folder / "run")
    train = training(folder, run, STEPS)
    log = folder / "log"
    first = watched(train, log, stop=signal.SIGTERM, when=lambda: len(logged_steps(run)) >= STEPS_BEFORE_STOP)
    yield "train: stops on SIGTERM with status 143", first["status"] == STOPPED
    yield "train: has a checkpoint of the last step", run.checkpoint_steps()[-1:] == logged_steps(run)[-1:] != []
    resumed = watched(train, log)
    yield "resume: ends with status 0", resumed["status"] == 0
    yield "resume: continues from the checkpoint", re.search(r"training: resumes from \S+", resumed["log"]) is not None
    yield "resume: logs every step once", logged_steps(run) == list(range(1, STEPS + 1))
    yield "merge: ends with status 0", watched(command("merge", run.path), log)["status"] == 0
    options = ("--shots", "1", "--max-new-tokens", "8", "--batch-size", "4")
    evaluated = watched(command("eval", run.path, *options), log)
    yield "eval: ends with status 0", evaluated["status"] == 0
    yield "eval: base, adapter and merged model", all(f"│ {name} " in evaluated["log"] for name in MODELS)
    half = RunFolder(folder / "run-float16")
    dtype = "quantization.bnb_4bit_compute_dtype=float16"
    yield "float16: ends with status 0", watched([*training(folder, half, FLOAT16_STEPS), dtype], log)["status"] == 0
    yield "float16: logs every step once", logged_steps(half) == list(range(1, FLOAT16_STEPS + 1))


MODELS = ("base", "adapter", "merged")


def training(folder: Path, run: RunFolder, num_steps: int) -> list[str]:
    """Return the command that trains."""
    settings = {
        "model.model_name_or_path": folder / "model", "data.train": folder / "rows.jsonl", "data.max_length": LENGTH,
        "train.max_steps": num_steps, "train.logging_steps": 1, "train.save_steps": STEPS, "train.learning_rate": 1e-2,
        "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 2, "run.output_dir": run.path,
    }  # fmt: skip
    return command(folder / "run.yaml", *(f"{key}={value}" for key, value in settings.items()))


def command(*words: object) -> list[str]:
    """Return a command line of the package."""
    return [sys.executable, "-m", "qlora_train.cli.main", *map(str, words)]


def logged_steps(run: RunFolder) -> list[int]:
    """Return the steps whose loss is in the metrics."""
    text = run.metrics_file.read_text(encoding="utf-8") if run.metrics_file.is_file() else ""
    metrics = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line["step"] for line in metrics if "loss" in line]


if __name__ == "__main__":
    sys.exit(main())
