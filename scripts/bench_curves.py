"""Compare loss curves of fused kernels, the reference, and another seed: real runs of a config, one process each.

Printed are the means of the loss over stretches of steps, and how far two curves are apart in them at most.

Example: ``python scripts/bench_curves.py configs/demo.yaml --steps 200``
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

STRETCH = 20
"""Steps of a mean."""
RUNS = {
    "fast": ["run.seed=42"],
    "plain": ["run.seed=42", "train.fused_kernels=false"],
    "plain, seed 43": ["run.seed=43", "train.fused_kernels=false"],
}


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_intermixed_args()
    with TemporaryDirectory() as folder:
        curves = {name: curve(options, settings, Path(folder) / name) for name, settings in RUNS.items()}
    print(f"loss, means of {STRETCH} steps")
    for name, means in curves.items():
        print(f"{name:16}", " ".join(f"{mean:.3f}" for mean in means))
    for name in ("fast", "plain, seed 43"):
        apart = np.abs(curves[name] - curves["plain"])
        print(f"{name} and plain: {apart.max():.4f} apart at most, {apart.mean():.4f} in the mean")


def curve(options: argparse.Namespace, settings: list[str], folder: Path) -> npt.NDArray[np.float64]:
    """Return the means of the loss of a run."""
    command = [sys.executable, "-m", "qlora_train.cli.main", str(options.config), *options.overrides, *settings]
    command += [f"train.max_steps={options.steps}", "train.logging_steps=1", "data.eval=null", "export.merge=false"]
    subprocess.run([*command, f"run.output_dir={folder}"], check=True, stdout=subprocess.DEVNULL)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    return np.array(losses[: len(losses) // STRETCH * STRETCH]).reshape(-1, STRETCH).mean(1)


if __name__ == "__main__":
    main()
