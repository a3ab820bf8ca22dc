"""Preference training beside TRL's DPOTrainer, and its memory beside that of supervised fine-tuning.

`speed`: each trainer trains the same pairs once, in a process of its own, in turn and in rounds; every batch has pairs of
like lengths. Steady steps are all but the first. A whole run is a process from start to end: libraries, data, model,
checks, training, adapter. TRL computes the reference for every batch, or once before training (`precompute_ref_log_probs`).

`memory`: steps of DPO on the pairs of one batch, and of SFT on the same sequences as rows, each in a fresh process: growth
of resident memory from the start of training, and the peak of the process.

Example: ``python scripts/bench_preferences.py speed .demo/pairs/train.jsonl --output benchmarks/results/dpo-trl.json``
"""

import argparse
import datetime
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import ROOT, machine

R, ALPHA, BETA, LEARNING_RATE, MAX_LENGTH = 16, 32, 0.1, 1e-5, 256
TRL = "trl"
OURS = "ours"
DPO = ["train.objective=dpo", f"train.beta={BETA}"]
Result = dict[str, Any]


def main() -> None:
    """Measure speed or memory; print the table, and write the numbers after every round."""
    options = parsed()
    measure, table = (speed, speed_table) if options.what == "speed" else (memory, memory_table)
    lines: list[str] = []
    for found in measure(options):
        lines = table(found)
        if options.output is not None:
            about = {
                "command": "python scripts/bench_preferences.py " + " ".join(sys.argv[1:]),
                "date": datetime.date.today().isoformat(), "machine": machine(), "table": lines, "runs": found,
            }  # fmt: skip
            options.output.write_text(json.dumps(about, indent=1) + "\n")
    print("\n".join(lines))


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("pairs", type=Path, help="pairs (prompt, chosen, rejected), as jsonl")
    parser.add_argument("--model", type=Path, default=Path(".demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step")
    parser.add_argument("--trl-batch-size", type=int, help="pairs per micro-batch of TRL (all of a step)")
    parser.add_argument("--trl-attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--names", nargs="+", help="what is measured (all)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of our runs")
    parser.add_argument("--output", type=Path, help="a file of JSON for what was measured")
    return parser.parse_args()


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> Iterator[dict[str, list[Result]]]:
    """Yield the results so far by name, after every round."""
    names = options.names or [OURS, TRL, f"{TRL}, precomputed"]
    found: dict[str, list[Result]] = {name: [] for name in names}
    with TemporaryDirectory() as folder:
        pairs = batches_of_like_lengths(options.pairs, options.batch_size, options.steps, Path(folder))
        for number in range(options.rounds):
            for name in names:
                settings = our_settings(options, pairs) if name.startswith(OURS) else trl_settings(options, pairs, name)
                script = "our_run.py" if name.startswith(OURS) else "trl_dpo.py"
                found[name].append(measured(script, settings, Path(folder)))
                result = found[name][-1]
                print(
                    f"round {number + 1}: {name}: {statistics.median(result['seconds']):.2f} s per step, "
                    f"{result['whole_seconds']:.0f} s in all", flush=True,
                )  # fmt: skip
            yield found


def batches_of_like_lengths(pairs: Path, batch_size: int, num_steps: int, folder: Path) -> Path:
    """Write as many pairs as all steps take, in batches of like lengths, and return the file."""
    lines = pairs.read_text(encoding="utf-8").splitlines()
    if len(lines) < batch_size * num_steps:
        raise SystemExit(f"{pairs}: {len(lines)} pairs, and {num_steps} steps take {batch_size * num_steps}")
    generator = random.Random(0)
    taken = sorted(generator.sample(lines, batch_size * num_steps), key=len)
    batches = [taken[begin : begin + batch_size] for begin in range(0, len(taken), batch_size)]
    generator.shuffle(batches)
    file = folder / "pairs.jsonl"
    file.write_text("".join(f"{line}\n" for batch in batches for line in batch), encoding="utf-8")
    return file


def our_settings(options: argparse.Namespace, pairs: Path) -> dict[str, Any]:
    """Return the settings of a run of this package."""
    overrides = [*common(options, pairs), *DPO, "train.group_by_length=true"]
    return {"overrides": [*overrides, f"train.max_steps={options.steps}", *options.set]}


def common(options: argparse.Namespace, rows: Path) -> list[str]:
    """Return the overrides of every run of this package."""
    return [
        f"model.model_name_or_path={options.model.resolve()}", f"data.train={rows}", f"data.max_length={MAX_LENGTH}",
        f"lora.r={R}", f"lora.lora_alpha={ALPHA}", f"train.learning_rate={LEARNING_RATE}",
        "train.lr_scheduler_type=linear", f"train.per_device_train_batch_size={options.batch_size}",
        "train.gradient_accumulation_steps=1", "train.gradient_checkpointing=none",
    ]  # fmt: skip


def trl_settings(options: argparse.Namespace, pairs: Path, name: str) -> dict[str, Any]:
    """Return the settings of TRL's trainer."""
    micro_batch_size = options.trl_batch_size or options.batch_size
    return {
        "model": str(options.model.resolve()), "pairs": str(pairs), "r": R, "alpha": ALPHA, "beta": BETA,
        "learning_rate": LEARNING_RATE, "max_length": MAX_LENGTH, "steps": options.steps, "batch_size": micro_batch_size,
        "accumulation": options.batch_size // micro_batch_size, "attention": options.trl_attention,
        "precompute": name.endswith("precomputed"), "precompute_batch_size": options.batch_size,
    }  # fmt: skip


def measured(script: str, settings: Mapping[str, Any], folder: Path) -> Result:
    """Run a peer in a process of its own and return what it measured, and the seconds from its start to its end."""
    asked, result, log = (folder / name for name in ("asked", "result", "log"))
    asked.write_text(json.dumps(settings))
    result.unlink(missing_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    # no cached tokens or checks: every run is a first run
    environment["XDG_CACHE_HOME"] = str(folder / f"cache-{time.monotonic_ns()}")
    command = [sys.executable, str(ROOT / "scripts" / "peers" / script), str(asked), str(result)]
    begun = time.perf_counter()
    with log.open("w") as output:
        ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False)
    if ended.returncode or not result.exists():
        raise SystemExit(f"{script}: status {ended.returncode}\n{log.read_text()[-3000:]}")
    content: Result = json.loads(result.read_text())
    return {**content, "whole_seconds": time.perf_counter() - begun}


def speed_table(found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return a line per trainer; ratios are medians of all rounds' steps, and of whole runs."""
    lines = [
        "| | s per step (rounds) | speedup | s per run (rounds) | speedup | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        cells = []
        for seconds in (step_seconds, run_seconds):
            rounds = ", ".join(f"{statistics.median(seconds([run])):.2f}" for run in runs)
            median = statistics.median(seconds(runs))
            ratio = median / statistics.median(seconds(found[OURS])) if OURS in found else math.nan
            cells += [f"{median:.2f} ({rounds})", "" if name == OURS else f"{ratio:.2f} x"]
        lines.append(f"| {name} | {' | '.join(cells)} | {max(run['peak_gb'] for run in runs):.2f} |")
    return lines


def step_seconds(runs: Sequence[Result]) -> list[float]:
    """Return the seconds of all steps but the first of each run."""
    return [second for run in runs for second in run["seconds"]]


def run_seconds(runs: Sequence[Result]) -> list[float]:
    """Return the seconds of each whole run."""
    return [run["whole_seconds"] for run in runs]


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> Iterator[dict[str, list[Result]]]:
    """Yield the results so far by name, after every round."""
    names = options.names or [f"{way}{layout}" for layout in ("", ", padded") for way in ("dpo", "sft")]
    found: dict[str, list[Result]] = {name: [] for name in names}
    with TemporaryDirectory() as folder:
        longest = sorted(options.pairs.read_text(encoding="utf-8").splitlines(), key=len)[-options.batch_size :]
        pairs, rows = Path(folder) / "pairs.jsonl", Path(folder) / "rows.jsonl"
        pairs.write_text("".join(f"{line}\n" for line in longest), encoding="utf-8")
        rows.write_text("".join(f"{line}\n" for line in map(both_rows, longest)), encoding="utf-8")
        for number in range(options.rounds):
            for name in names:
                result = measured("our_run.py", memory_settings(options, name, pairs, rows), Path(folder))
                found[name].append(result)
                print(f"round {number + 1}: {name}: grows by {result['growth_gb']:.3f} GB, peak {result['peak_gb']:.3f} GB",
                      flush=True)  # fmt: skip
            yield found


def both_rows(line: str) -> str:
    """Return the two sequences of a pair as rows of SFT."""
    pair = json.loads(line)
    return "\n".join(json.dumps({"messages": pair["prompt"] + pair[answer]}) for answer in ("chosen", "rejected"))


def memory_settings(options: argparse.Namespace, name: str, pairs: Path, rows: Path) -> dict[str, Any]:
    """Return the settings of a run whose every step is the same batch."""
    is_sft = name.startswith("sft")
    overrides = common(options, rows if is_sft else pairs) + ([] if is_sft else DPO)
    if is_sft:
        overrides.append(f"train.per_device_train_batch_size={2 * options.batch_size}")
    if name.endswith("padded"):
        overrides.append("train.padding_free=false")
    return {"overrides": [*overrides, f"train.max_steps={options.steps}", *options.set]}


def memory_table(found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return a line per way; ratios are of medians over rounds, DPO to SFT in the same layout."""
    lines = ["| | growth in training, GB (rounds) | to SFT | peak, GB (rounds) | to SFT |", "|---|---|---|---|---|"]
    for name, runs in found.items():
        cells = []
        of_sft = found.get(name.replace("dpo", "sft"), [])
        for key in ("growth_gb", "peak_gb"):
            median = statistics.median(run[key] for run in runs)
            ratio = median / statistics.median(run[key] for run in of_sft) if of_sft else math.nan
            rounds = ", ".join(f"{run[key]:.3f}" for run in runs)
            cells += [f"{median:.3f} ({rounds})", f"{ratio:.2f} x"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
