"""Time a training step at each level of activation checkpointing, beside a step that computes nothing twice.

One process, one model and the same batches for all. The floor has no checkpointing, and the base's weights are dequantized
before it. `of matmul` is the share of the best rate of bfloat16 products (`scripts/matmul_rate.py`) that the operations of
the batch are (`scripts/model_flops.py`); what is recomputed does not count. Peaks are torch's, of allocated memory.

Example: ``python scripts/bench_levels.py run.yaml data.packing=true data.max_length=2048 --output levels.json``
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_step import Steps
from matmul_rate import measured as matmul_rates
from model_flops import model_shape, step_flops
from peers.timing import row_lengths

from qlora_train.config import RunConfig, load_config
from qlora_train.kernels.checkpointing_levels import LEVELS
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.errors import first_line

FLOOR = "none, dequantized weights"


def main() -> int:
    """Print the table; exit status 1 if a level was not measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    steps = Steps(config, options.rounds + 1)
    if len(steps) <= options.rounds:
        parser.error(f"--rounds {options.rounds}: an epoch has {len(steps)} steps, and one warms up; ask for fewer")
    flops, num_tokens, linears = operations(steps, config)
    result: dict[str, Any] = {"levels": {}, "flops": flops, "num_tokens": num_tokens}
    result["matmul"] = [matmul_rates(max(num_tokens), linears)]
    for name, set_level in levels(steps):
        set_level()
        result["levels"][name] = tried(steps, options.rounds)
        options.output.write_text(json.dumps(result) + "\n")
        print(f"{name}: {result['levels'][name]}", flush=True)
    result["matmul"].append(matmul_rates(max(num_tokens), linears))
    result["table"] = table(result)
    options.output.write_text(json.dumps(result) + "\n")
    print("\n".join(result["table"]))
    return 1 if any("failed" in level for level in result["levels"].values()) else 0


def operations(steps: Steps, config: RunConfig) -> tuple[list[float], list[int], tuple[tuple[int, int], ...]]:
    """Return the operations and the tokens of each step, and (in, out) of the model's linear layers."""
    shape = model_shape(json.loads((Path(config.model.model_name_or_path) / "config.json").read_text()))
    flops, num_tokens = [], []
    for number in range(len(steps)):
        lengths = [length for batch in steps.batches(number) for length in row_lengths(batch)]
        num_labels = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in steps.batches(number))
        flops.append(step_flops(shape, r=config.lora.r, row_lengths=lengths, num_labels=num_labels).total)
        num_tokens.append(sum(lengths))
    return flops, num_tokens, shape.linears


def levels(steps: Steps) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what is measured by name, with what sets it: least memory first, the floor last."""
    fast = steps.install()
    layers = LayerCheckpointing(steps.model, fast.mlps)
    for level in filter(layers.supports, reversed(LEVELS)):
        yield level, partial(layers.set, level)

    def dequantize() -> None:
        layers.set("none")
        for weight in fast.weights:
            weight.cache()

    yield FLOOR, dequantize


def tried(steps: Steps, num_rounds: int) -> dict[str, Any]:
    """Return tokens/s of each round after one that warms up, and the peak; or that memory ran out."""
    on_gpu = steps.loaded.device.type == "cuda"
    try:
        steps.take(0)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        speeds = [steps.take(number) for number in range(1, num_rounds + 1)]
    except torch.OutOfMemoryError as error:
        return {"failed": first_line(error)}
    finally:
        if on_gpu:
            torch.cuda.empty_cache()
    return {"tokens_per_second": speeds, "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}


def table(result: dict[str, Any]) -> list[str]:
    """Return a line for each level, and one for the rate of products."""
    best = max(rate[f"{kind}_flops_per_second"] for rate in result["matmul"] for kind in ("square", "model"))
    floor = result["levels"][FLOOR].get("tokens_per_second")
    lines = [f"{'checkpointing':28}{'tokens/s':>10}{'of floor':>10}{'of matmul':>11}{'step s':>9}{'peak GB':>9}"]
    for name, level in result["levels"].items():
        if "failed" in level:
            lines.append(f"{name:28}{level['failed']}")
            continue
        speeds, num_tokens, flops = level["tokens_per_second"], result["num_tokens"][1:], result["flops"][1:]
        of_floor = [speed / other for speed, other in zip(speeds, floor, strict=True)] if floor else [float("nan")]
        seconds = [tokens / speed for tokens, speed in zip(num_tokens, speeds, strict=False)]
        share = sum(flops[: len(seconds)]) / sum(seconds) / best
        peak = "" if level["peak_bytes"] is None else f"{level['peak_bytes'] / 1e9:.2f}"
        lines.append(
            f"{name:28}{statistics.median(speeds):10.0f}{statistics.median(of_floor):8.2f} x{100 * share:9.1f} %"
            f"{statistics.median(seconds):9.3f}{peak:>9}"
        )
    tokens = statistics.median(result["num_tokens"])
    return [*lines, f"matmul: {best / 1e12:.3g} TFLOP/s, bfloat16; {tokens:.0f} tokens per step"]


if __name__ == "__main__":
    raise SystemExit(main())
