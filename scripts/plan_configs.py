"""Plan every shipped config on GPUs of several sizes, as `qlora-train plan CONFIG --memory SIZE --no-data` does.

Rows have `data.max_length` tokens, all of them labels. `least` is what the config needs with every layer recomputed, the
CUDA context included; the other columns are the planned peak on a GPU of that size, where `-` says that it does not fit.

Example::

    PYTHONPATH=. python scripts/plan_configs.py > benchmarks/results/plan.txt
"""

from pathlib import Path

from qlora_train.config import load_config
from qlora_train.planning.base_config import well_known_models
from qlora_train.planning.plan_device import plan_device
from qlora_train.planning.run_plan import RunPlan, plan_run
from qlora_train.planning.workload import RowSizes

ROOT = Path(__file__).parents[1]
SIZES = ("8GiB", "16GiB", "24GiB", "48GiB", "80GiB")


def plan_of(path: Path, memory: str) -> RunPlan:
    """Return the plan of a shipped config on a GPU."""
    config = load_config(path)
    base = well_known_models()[config.model.model_name_or_path]
    return plan_run(config, base, plan_device(memory), RowSizes.most(config))


def main() -> None:
    """Print a line per config."""
    print(f"{'config':34} {'rows x tokens':>14} {'least':>7}" + "".join(f" {size:>7}" for size in SIZES) + "  (GB)")
    for path in sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("recipes/*.yaml")]):
        config = load_config(path)
        if config.model.model_name_or_path not in well_known_models():
            continue  # the demo trains on the CPU
        plans = [plan_of(path, size) for size in SIZES]
        rows, length = config.train.per_device_train_batch_size, config.data.max_length
        peaks = [f"{plan.fitted.plan.needed_bytes / 1e9:7.1f}" if plan.fitted.fits else f"{'-':>7}" for plan in plans]
        least = min(plan.fitted.least_bytes for plan in plans)
        print(f"{path.relative_to(ROOT)!s:34} {f'{rows} x {length}':>14} {least / 1e9:7.1f} {' '.join(peaks)}")


if __name__ == "__main__":
    main()
