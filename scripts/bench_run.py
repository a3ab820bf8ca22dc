"""Train through the command line, kill the process, resume, finish; print the loss and the memory.

The command is started on a model and rows, killed (SIGKILL) when its first checkpoint is there, and repeated as it was.
Checked are that it resumes from a checkpoint, that every step is logged once, that the loss falls, and that the fused
kernels passed their parity check. Beside the plan, which counts memory from config.json alone, stand torch's peak in the
memory probe and the device's, as the driver counts it. Exit status 1 if a check fails; the numbers are written in any case.

Example: ``python scripts/bench_run.py build/llama-3.1-8b build/rows.jsonl --output run.json train.learning_rate=1e-3``
"""

import argparse
import json
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qlora_train.config import LoraSection
from qlora_train.planning.memory import plan_memory, step_settings
from qlora_train.planning.run_plan import model_shapes
from qlora_train.runs import RunFolder, read_json

SAVE_STEPS = 4
POLL_SECONDS = 0.1
RANK = 16


def main() -> int:
    """Do it and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_intermixed_args()
    with TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        command = command_of(options, Path(folder), run)
        killed = watched(command, Path(folder) / "log", stop=signal.SIGKILL, when=run.checkpoint(SAVE_STEPS).is_dir)
        resumed = watched(command, Path(folder) / "log")
        metrics = run.metrics_file.read_text() if run.metrics_file.is_file() else ""
        fused = read_json(run.fused_kernels_file).get("passed")
    losses = {line["step"]: line["loss"] for line in map(json.loads, metrics.splitlines()) if "loss" in line}
    counted = memory(json.loads((options.model / "config.json").read_text()), resumed)
    result = {
        "model": options.model.name,
        "checks": checks(losses, resumed["log"], options.steps, killed["status"], resumed["status"])
        | {"fused kernels passed their parity check": fused is True}
        | {"the peak is measured": counted["plan_bytes"] is not None},
        "start": killed["log"].partition("step 1/")[0].splitlines(),
        "losses": list(losses.values()),
        "memory": counted,
        "seconds": [part["seconds"] for part in (killed, resumed)],
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(result)))
    return 0 if all(result["checks"].values()) else 1


def command_of(options: argparse.Namespace, folder: Path, run: RunFolder) -> list[str]:
    """Return the command of a run in `folder`."""
    config = folder / "run.yaml"
    config.write_text("data:\n  packing: true\n")
    settings = {
        "model.model_name_or_path": options.model.resolve(), "data.train": options.rows.resolve(),
        "data.max_length": options.max_length, "lora.r": RANK, "train.max_steps": options.steps,
        "train.save_steps": SAVE_STEPS, "train.logging_steps": 1, "train.gradient_accumulation_steps": 1,
        "train.gradient_checkpointing": "full",  # as the plan counts; auto would fill the device
        "run.output_dir": run.path,
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "qlora_train.cli.main", str(config), "--verbose", *words, *options.overrides]


def watched(
    command: Sequence[str], log: Path, *, stop: signal.Signals | None = None, when: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Run a command and return its status, output, time and the GPU memory that it took.

    Args:
        command: its output is printed when it ends.
        log: file for the output.
        stop: signal to send, once, when `when` first holds.
        when: polled while the command runs.
    """
    before, peak, began = device_bytes(), 0, time.monotonic()
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            while process.poll() is None:
                peak = max(peak, device_bytes())
                if stop is not None and when():
                    process.send_signal(stop)
                    stop = None
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:  # a time limit: what there is counts
            process.kill()
        print(f"$ {shlex.join(command)}\n{log.read_text()}status {process.wait()}", flush=True)
    return {
        "status": process.returncode,
        "log": log.read_text(),
        "seconds": time.monotonic() - began,
        "device_bytes": peak - before if peak else None,
    }


def device_bytes() -> int:
    """Return the memory of the first GPU that is in use, as the driver counts it; 0 without one."""
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return int(answer) << 20 if answer.isdigit() else 0


def checks(losses: Mapping[int, float], log: str, num_steps: int, killed: int, resumed: int) -> dict[str, bool]:
    """Return what must hold, by what it says."""
    values = list(losses.values())
    quarter = max(1, len(values) // 4)
    return {
        "killed before its end": killed == -signal.SIGKILL,
        "ended well": resumed == 0,
        "went on from a checkpoint": re.search(r"training: resumes from \S+", log) is not None,
        "every step is there once": list(losses) == list(range(1, num_steps + 1)),
        "the loss falls": len(values) > 1 and statistics.mean(values[-quarter:]) < statistics.mean(values[:quarter]),
    }


def memory(config_json: dict[str, Any], resumed: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the bytes that the plan counts for the largest batch, those of torch's allocator, and the device's."""
    batch = re.search(
        r"memory: training on (\d+) x (\d+) tokens with (\d+) labels fits(?: \(peak ([\d.]+) GB\))?", resumed["log"]
    )
    if batch is None:
        return {"plan_bytes": None, "torch_bytes": None, "device_bytes": None}
    rows, length, num_labels = (int(batch[place]) for place in (1, 2, 3))
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    model = model_shapes(config_json, LoraSection(r=RANK))
    plan = plan_memory(
        model,
        step_settings(model, r=RANK, num_tokens=rows * length, num_labels=num_labels, gpu_bytes=gpu_bytes),
    )
    torch_bytes = int(float(batch[4]) * 1e9) if batch[4] else None
    return {"plan_bytes": plan.needed_bytes, "torch_bytes": torch_bytes, "device_bytes": resumed["device_bytes"]}


def table(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of the summary."""
    lines = [line[:200] for line in result["start"]]  # what was chosen, and why
    lines += [f"{'ok  ' if holds else 'FAIL'} {check}" for check, holds in result["checks"].items()]
    if result["losses"]:
        lines.append(f"loss: {result['losses'][0]:.3f} to {result['losses'][-1]:.3f} in {len(result['losses'])} steps")
    sizes = {name.removesuffix("_bytes"): count for name, count in result["memory"].items() if count is not None}
    return [*lines, "memory: " + ", ".join(f"{name} {count / 1e9:.3f} GB" for name, count in sizes.items())]


if __name__ == "__main__":
    sys.exit(main())
