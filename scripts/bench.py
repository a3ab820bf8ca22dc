"""Training beside other trainers: the same rows and settings, a process each, in turn, several rounds.

A peer runs with a Python of its own, in which it is installed: ``--peer NAME=PYTHON``. Peers: trl, unsloth. Ratios are
medians over the rounds, each against this package in the same round. A peer whose gradient is zero is said to be broken.

Example: ``python scripts/bench.py --peer trl=.venv/bin/python --peer unsloth=PYTHON --output FILE.json``
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPTS = {"ours": "ours.py", "ours, no kept weights": "ours.py", "trl": "trl_best.py", "unsloth": "unsloth_best.py"}
OVERRIDES = {"ours, no kept weights": ["train.dequantized_cache_gb=0"]}


def main() -> None:
    """Run the rounds, print a table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", default=".demo/addresses/train.jsonl", help="conversations (messages), as jsonl")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    unknown = [peer for peer in options.peer if peer.partition("=")[0] not in SCRIPTS or "=" not in peer]
    if unknown:
        parser.error(f"--peer {unknown[0]}: give NAME=PYTHON; names are trl and unsloth")
    pythons = {"ours": sys.executable, "ours, no kept weights": sys.executable}
    pythons |= dict(peer.split("=", 1) for peer in options.peer)
    settings = {
        "model": str(Path(options.model).resolve()), "max_length": 256, "r": 16, "alpha": 32, "learning_rate": 2e-4,
        "batch_size": options.batch_size, "steps": options.steps,
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with TemporaryDirectory() as folder:
        pairs = written_as_pairs(Path(options.rows), Path(folder) / "pairs.jsonl")
        for number in range(options.rounds):
            for name, python in pythons.items():
                rows = options.rows if name.startswith("ours") else str(pairs)
                own = {**settings, "rows": str(Path(rows).resolve()), "overrides": OVERRIDES.get(name, [])}
                found[name].append(measured(name, python, own, Path(folder)))
                print(f"round {number + 1}: {name}: {speed(found[name][-1]):.0f} tokens/s", flush=True)
    lines = table(found)
    print("\n".join(lines))
    if options.output:
        about = {
            "settings": {**settings, "model": Path(options.model).name},
            "machine": machine(),
            "table": lines,
            "runs": found,
        }
        options.output.write_text(json.dumps(about, indent=1) + "\n")


def written_as_pairs(rows: Path, file: Path) -> Path:
    """Write conversations as prompt and completion, for trainers that mask prompts in no other way."""
    with rows.open() as source, file.open("w") as target:
        for line in source:
            *prompt, answer = json.loads(line)["messages"]
            target.write(json.dumps({"prompt": prompt, "completion": [answer]}) + "\n")
    return file


def measured(name: str, python: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what a peer measured of itself."""
    asked, result, log = (folder / f"{kind}-{name.split(',', maxsplit=1)[0]}" for kind in ("asked", "result", "log"))
    asked.write_text(json.dumps(settings))
    result.unlink(missing_ok=True)
    command = [python, str(ROOT / "scripts" / "peers" / SCRIPTS[name]), str(asked), str(result)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False)
    if ended.returncode or not result.exists():
        raise SystemExit(f"{name}: status {ended.returncode}: {log.read_text()[-2000:]}")
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def speed(run: dict[str, Any]) -> float:
    """Return tokens a second over all steps but the first."""
    return float(sum(run["tokens"]) / sum(run["seconds"]))


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a line a peer."""
    lines = [f"{'':24}{'tokens/s':>10}{'ours is':>12}{'step s (p10-p90)':>26}{'peak GB':>9}  loss, first to last"]
    for name, runs in found.items():
        ratios = [speed(ours) / speed(run) for ours, run in zip(found["ours"], runs, strict=True)]
        steps = sorted(seconds for run in runs for seconds in run["seconds"])
        tenth = len(steps) // 10
        spread = f"{statistics.median(steps):.2f} ({steps[tenth]:.2f}-{steps[-1 - tenth]:.2f})"
        broken = "" if all(norm > 0 for run in runs for norm in run["grad_norms"]) else "  BROKEN: a gradient is zero"
        first, last = (statistics.median(run["losses"][place] for run in runs) for place in (0, -1))
        lines.append(
            f"{name:24}{statistics.median(map(speed, runs)):10.0f}{statistics.median(ratios):10.2f} x{spread:>26}"
            f"{max(run['peak_gb'] for run in runs):9.2f}  {first:.3f} {last:.3f}{broken}"
        )
    return lines


def machine() -> dict[str, Any]:
    """Return what was measured on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {"cpu": cpu.partition(": ")[2], "cores": os.cpu_count(), "python": platform.python_version()}


if __name__ == "__main__":
    main()
