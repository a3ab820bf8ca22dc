"""Planned and measured peaks of real runs on this machine, a process each: `plan.json` beside what results.json measured.

The models have random weights, are small enough for a minute each, and large enough that Python's own memory does not
decide: 40 to 200 MB. On a CPU the measure is the growth of resident memory from before the base is loaded, on a GPU
torch's allocations with the CUDA context.

Example::

    PYTHONPATH=. python scripts/bench_plan.py > benchmarks/results/plan-measured.txt
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096, "vocab_size": 8192,
    "initializer_range": 0.02,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_local_experts": 8,
    "moe_intermediate_size": 512,
    "num_experts_per_tok": 2,
}
LONG = ("data.max_length=512", "train.per_device_train_batch_size=4")
SHORT = ("data.max_length=128", "train.per_device_train_batch_size=8")
ONE_ROW = ("data.max_length=256", "train.per_device_train_batch_size=1")
VARIED_LENGTHS = (31, 55, 78, 97, 123, 162, 240, 479)
"""Of rows whose lengths differ, as those of most data sets: kernels are compiled for each length of a batch."""
NO_CACHE = ("train.dequantized_cache_gb=0",)


@dataclass(frozen=True)
class Case:
    """One run."""

    family: str
    settings: Sequence[str]
    shape: dict[str, Any] | None = None
    has_varied_rows: bool = False


CASES = (
    Case("llama", LONG), Case("llama", SHORT), Case("llama", (*LONG, *NO_CACHE)),
    Case("llama", (*LONG, *NO_CACHE, "train.gradient_checkpointing=full")),
    Case("llama", (*LONG, *NO_CACHE, "train.gradient_checkpointing=mlp")),
    Case("llama", (*LONG, "train.fused_kernels=false")), Case("llama", (*LONG, "train.optim=sgd", "lora.r=128")),
    Case("mistral", LONG), Case("qwen2", SHORT), Case("qwen3", LONG), Case("gemma", LONG), Case("gemma3_text", SHORT),
    Case("phi3", LONG), Case("olmo2", LONG), Case("smollm3", ONE_ROW), Case("granite", LONG),
    Case("qwen3_moe", LONG, EXPERTS), Case("mixtral", SHORT, EXPERTS), Case("starcoder2", LONG),
    Case("llama", (*LONG, "train.max_steps=16"), has_varied_rows=True),
)  # fmt: skip


def main() -> None:
    """Run every case and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train(options.child[0], options.child[1:])
        return
    print(f"{'':3} {'family':12} {'settings':78} {'planned':>8} {'measured':>8} {'ratio':>6}  planned at")
    for number, case in enumerate(CASES):
        if options.only and number not in options.only:
            continue
        plan, kept = measured(case)
        predicted, peak = kept["predicted_peak_bytes"], kept["measured_peak_bytes"]
        print(
            f"{number:3} {case.family:12} {' '.join(case.settings):78} {predicted / 1e6:8.0f} {peak / 1e6:8.0f} "
            f"{predicted / peak:6.3f}  {plan['peak_moment']}",
            flush=True,
        )


def measured(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a case in a process of its own; return plan.json and the measured part of results.json."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_case(folder, case)
        command = [sys.executable, __file__, "--child", str(folder / "run.yaml"), *case.settings]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{case}: {done.stderr[-3000:]}")
        run = folder / "run"
        return json.loads((run / "plan.json").read_text()), json.loads((run / "results.json").read_text())["plan"]


def train(file: str, overrides: Sequence[str]) -> None:
    """Train a config as the command does, without the checks of its adapter."""
    from qlora_train.config import load_run_config
    from qlora_train.pipeline import train_adapter
    from qlora_train.runs.shared_run import open_shared_run

    config = load_run_config(Path(file), overrides)
    with open_shared_run(config, resume="never") as (folder, checkpoint):
        train_adapter(config, folder, checkpoint)


def write_case(folder: Path, case: Case) -> None:
    """Write model, rows and config of a case."""
    from tests.support.pico import build_pico

    build_pico(folder / "base", case.family, **{**SHAPE, **(case.shape or {})})
    length = next(int(word.partition("=")[2]) for word in case.settings if word.startswith("data.max_length="))
    with (folder / "rows.jsonl").open("w") as rows:
        for row in range(256 if case.has_varied_rows else 16):
            num_tokens = VARIED_LENGTHS[row % len(VARIED_LENGTHS)] + row // 8 if case.has_varied_rows else length
            tokens = [4 + (7 * row + 3 * place) % 250 for place in range(num_tokens)]
            rows.write(json.dumps({"input_ids": tokens, "labels": tokens}) + "\n")
    (folder / "run.yaml").write_text(
        f"model: {{model_name_or_path: {folder / 'base'}}}\n"
        f"data: {{train: {folder / 'rows.jsonl'}, format: tokens, train_on: all}}\n"
        "train: {max_steps: 2, gradient_accumulation_steps: 2, logging_steps: 1, learning_rate: 1e-3}\n"
        f"run: {{output_dir: {folder / 'run'}}}\n"
    )


if __name__ == "__main__":
    main()
