"""Time training steps under each way that OpenMP threads may wait, on free CPUs and beside other programs.

One process for each policy prepares the same steps; then all take them in turn, at each load. A load is a number of
endless loops. `chosen` is what a run would choose if it started under that load (qlora_train/utils/cpu_threads.py).

Example: ``python scripts/bench_threads.py configs/demo.yaml --loads 0 1 2 4``
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLICIES = {
    "default": {},
    "spin": {"GOMP_SPINCOUNT": "20000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
CHOOSE = """
import os
from qlora_train.utils.cpu_threads import choose_wait_policy
choose_wait_policy()
print("passive" if "OMP_WAIT_POLICY" in os.environ else "spin")
"""


def main() -> None:
    """Print tokens per second by policy and load, and what the choice is worth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--loads", type=int, nargs="+", default=[0, 1, 2, 4], help="endless loops beside the training")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a file of JSON for what was measured")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.config, options.steps)
        return
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, __file__, str(options.config), "--steps", str(options.steps), "--worker"]
    workers = {
        name: subprocess.Popen(
            command, env=environment | policy, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name, policy in POLICIES.items()
    }
    try:
        for worker in workers.values():
            _answer(worker)  # it is ready
        measured = {}
        for load in options.loads:
            with _loops(load):
                chosen = _chosen(environment)
                rounds = [{name: _ask(worker) for name, worker in workers.items()} for _ in range(options.rounds)]
            ratios = [each[chosen] / max(each.values()) for each in rounds]
            speeds = {name: [round(each[name], 1) for each in rounds] for name in workers}
            measured[load] = {"chosen": chosen, "tokens_per_second": speeds}
            medians = ", ".join(f"{name} {statistics.median(values):.0f}" for name, values in speeds.items())
            print(f"load {load}: tokens/s {medians}; chosen: {chosen}, {statistics.median(ratios):.2f} of the best")
    finally:
        for worker in workers.values():
            worker.kill()
    if options.output:
        options.output.write_text(json.dumps(measured, indent=1) + "\n")


def _work(config: Path, num_steps: int) -> None:
    """Take the steps each time a line comes in, and answer with their tokens per second."""
    from bench_step import Steps

    from qlora_train.config import load_config

    steps = Steps(load_config(config), num_steps + 1)
    for weight in steps.install().weights:
        weight.cache()
    steps.take(0, end_to_end=steps.end_to_end)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(
            statistics.harmonic_mean([steps.take(n, end_to_end=steps.end_to_end) for n in range(1, len(steps))]),
            flush=True,
        )


def _ask(worker: "subprocess.Popen[str]") -> float:
    assert worker.stdin is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return float(_answer(worker))


def _answer(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        sys.exit("a worker has ended; its error is above")
    return line


def _chosen(environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", CHOOSE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def _loops(number: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        time.sleep(1)
        yield
    finally:
        for loop in loops:
            loop.kill()


if __name__ == "__main__":
    main()
