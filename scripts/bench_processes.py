"""Compare a run of two processes of one thread with one process of two threads: the same rows, steps and global batch.

The runs alternate, and the order changes from round to round. Printed are the seconds of the optimizer steps without
start-up, their ratio in each round, and how far the mean losses are apart. `make demo` makes the model and the rows.

Example: ``python scripts/bench_processes.py`` (less than 5 minutes on two free cores)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_train.runs import RunFolder, read_json

ROOT = Path(__file__).parents[1]
SETUPS = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def main() -> None:
    """Print a line per round and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a file of JSON for what was measured")
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds):
        names = list(SETUPS) if number % 2 == 0 else list(reversed(SETUPS))
        results = {name: measure(options.config, options.steps, *SETUPS[name]) for name in names}
        one, two = (results[name] for name in SETUPS)
        assert one["num_tokens"] == two["num_tokens"], "the setups trained different rows"
        ratio = one["train_seconds"] / two["train_seconds"]
        difference = abs(one["train_loss"] - two["train_loss"]) / one["train_loss"]
        seconds = ", ".join(f"{name} {results[name]['train_seconds']:.1f} s" for name in SETUPS)
        print(f"round {number + 1}: {seconds}; speedup {ratio:.2f}; losses differ by {difference:.1e}", flush=True)
        rounds.append({"speedup": ratio, "setups": results})
    print(f"2 processes of 1 thread: {statistics.median(each['speedup'] for each in rounds):.2f} times as fast")
    if options.output:
        options.output.write_text(json.dumps({"steps": options.steps, "rounds": rounds}, indent=1) + "\n")


def measure(config: Path, num_steps: int, num_processes: int, num_threads: int) -> dict[str, float]:
    """Train a new run with the command line; return its seconds, tokens and mean loss."""
    with TemporaryDirectory() as folder:
        settings = {
            "train.max_steps": num_steps, "data.eval": "null", "train.eval_steps": "null", "export.merge": "false",
            "parallel.processes": num_processes, "run.output_dir": Path(folder) / "run",
        }  # fmt: skip
        words = [str(config), *(f"{key}={value}" for key, value in settings.items())]
        command = [sys.executable, "-m", "qlora_train.cli.main", *words]
        environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
        run = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
        if run.returncode:
            sys.exit(f"{run.stdout}{run.stderr}status {run.returncode}")
        training = read_json(RunFolder(Path(folder) / "run").results_file)["training"]
    return {**training["since_last_start"], "train_loss": training["train_loss"]}


if __name__ == "__main__":
    main()
