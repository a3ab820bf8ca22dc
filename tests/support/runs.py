"""Real runs on pico models: config, rows, and the pipeline."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.adapters import AdaptedModel, attach_adapter, trainable_state
from qlora_train.config import RunConfig, load_config
from qlora_train.export import adapter_check, fresh_process
from qlora_train.export.merging import verify
from qlora_train.models import load_model
from qlora_train.pipeline import run
from qlora_train.runs import RunFolder

ROWS = 24


def write_rows(path: Path, *, count: int = ROWS, seed: int = 0, system: str = "") -> Path:
    """Write sums of ragged length as chat rows, with a system prompt if given."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            numbers = [generator.randint(1, 99) for _ in range(generator.randint(2, 6))]
            turns = [
                {"role": "user", "content": " + ".join(map(str, numbers))},
                {"role": "assistant", "content": json.dumps({"sum": str(sum(numbers))})},
            ]
            prefix = [{"role": "system", "content": system}] if system else []
            file.write(json.dumps({"messages": prefix + turns}) + "\n")
    return path


def make_config(folder: Path, base: Path, *overrides: str, name: str = "run") -> RunConfig:
    """Return the config of a run in `folder/name`; its rows are written beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    settings = [
        f"model.model_name_or_path={base}",
        f"data.train={rows}",
        "data.eval=0.25",
        "data.max_length=128",
        "lora.r=8",
        "train.learning_rate=1e-2",
        "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=2",
        "train.max_steps=6",
        "train.logging_steps=1",
        "train.eval_steps=100",
        "train.save_steps=100",
        "train.save_total_limit=100",
        f"run.output_dir={folder / name}",
    ]
    file = folder / f"{name}.yaml"
    file.write_text("run:\n  seed: 7\n", encoding="utf-8")
    return load_config(file, [*settings, *overrides])


def train_run(folder: Path, base: Path, *overrides: str, name: str = "run", resume: str = "auto") -> RunFolder:
    """Train a config of `make_config`."""
    return run(make_config(folder, base, *overrides, name=name), resume=resume)


def stopped_copy(finished: RunFolder, path: Path) -> RunFolder:
    """Copy a finished run as of a stop before its latest checkpoint."""
    run_folder = RunFolder(Path(shutil.copytree(finished.path, path)))
    shutil.rmtree(run_folder.adapter)
    shutil.rmtree(run_folder.checkpoint(run_folder.checkpoint_steps()[-1]))
    return run_folder


def adapted_model(folder: Path, base: Path, *overrides: str, dtype: str = "float32") -> AdaptedModel:
    """Return a 4-bit base with an adapter of random, nonzero matrices."""
    config = make_config(folder, base, f"quantization.bnb_4bit_compute_dtype={dtype}", *overrides)
    found = attach_adapter(load_model(config.model, config.quantization), config.lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable_state(found.model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return found


def metrics(run_folder: RunFolder) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in run_folder.metrics_file.read_text(encoding="utf-8").splitlines()]


def losses(run_folder: RunFolder) -> list[float]:
    """Return the training loss of every step."""
    return [line["loss"] for line in metrics(run_folder) if "loss" in line]


def adapter_bytes(run_folder: RunFolder) -> bytes:
    """Return the bytes of the finished adapter's weights file."""
    return (run_folder.adapter / "adapter_model.safetensors").read_bytes()


def stopped_after(step: int, run: RunFolder, copy: Path) -> RunFolder:
    """Return a copy of a finished run as of a kill just after `step`."""
    shutil.copytree(run.path, copy)
    stopped = RunFolder(copy)
    shutil.rmtree(stopped.adapter)
    stopped.results_file.unlink()
    for later in [number for number in stopped.checkpoint_steps() if number > step]:
        shutil.rmtree(stopped.checkpoint(later))
    return stopped


def check_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs check saved models without a fresh process, which imports everything for seconds beside a GPU."""

    def check_here(
        _where: Path, code: str, reference: Path, *, batch_size: int, error: Any
    ) -> fresh_process.ReloadCheck:
        answer = fresh_process._measure(code, reference, batch_size)
        divergence = fresh_process.Divergence(**answer["divergence"])
        return fresh_process.ReloadCheck(answer["loss"], divergence, tuple(answer["token_differences"]))

    for module in (adapter_check, verify):
        monkeypatch.setattr(module, "check_in_fresh_process", check_here)
