"""Measure the demo over seeds, in 4 bits and in 16 bits with the same settings: how much of its result is luck?

Writes one JSON file with the command, the machine, the versions and every run's figures; runs that are there already are
not repeated. The demo model and data must be there (`make demo` makes them).
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qlora_train.export.model_card import library_versions

PRECISIONS: dict[str, list[str]] = {"nf4": [], "16-bit": ["quantization.load_in_4bit=false"]}


def measure(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train one run without a merge, evaluate its adapter and return its results."""
    folder = Path("runs") / name
    command = [sys.executable, "-m", "qlora_train.cli.main"]
    settings = [f"run.seed={seed}", f"run.output_dir={folder}", "export.merge=false", *overrides]
    started = time.perf_counter()
    subprocess.run([*command, "configs/demo.yaml", *settings], check=True)
    subprocess.run([*command, "eval", str(folder), "--models", "adapter", "--max-new-tokens", "128"], check=True)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    wall_seconds = time.perf_counter() - started
    return {
        "wall_seconds": wall_seconds,
        "training": results["training"],
        "evaluation": results["evaluation"]["adapter"],
    }


def main() -> None:
    """Run the seeds in the precisions that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/demo-seeds.json"))
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python scripts/bench_demo.py",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": library_versions(),
        "runs": {},
    }
    if options.output.is_file():
        report["runs"] = json.loads(options.output.read_text(encoding="utf-8"))["runs"]
    for seed in options.seeds:
        for precision in options.precisions:
            name = f"demo-{precision}-seed{seed}"
            if name not in report["runs"]:
                report["runs"][name] = measure(name, seed, PRECISIONS[precision])
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            figures = report["runs"][name]["evaluation"]
            print(f"{name}: exact match {figures['exact_match']:.1%}, field F1 {figures['field_f1']:.3f}")


if __name__ == "__main__":
    main()
