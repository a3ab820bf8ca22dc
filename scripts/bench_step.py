"""Time training steps of a config on this machine: the plain path, the fast path, and the fast path with kept weights.

All three take the same batches in turn, in one process; padding does not count as tokens. Ratios are medians over rounds.

Example: ``GOMP_SPINCOUNT=20000 python scripts/bench_step.py configs/demo.yaml``
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qlora_train.adapter import attach_adapter, trainable_state
from qlora_train.checkpoint import RunFolder
from qlora_train.config import load_config
from qlora_train.data.batches import Collator, RowDataset, epoch_order, padding_multiple
from qlora_train.kernels.fast_path import install
from qlora_train.loader import load_model
from qlora_train.loss import label_losses
from qlora_train.pipeline import prepare

PATHS = ("plain", "fast", "fast, kept weights")


def main() -> None:
    """Print tokens a second and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    with tempfile.TemporaryDirectory() as nowhere:
        source, data = prepare(config, RunFolder(Path(nowhere)))
    loaded = load_model(config.model, config.quantization, source=source)
    model = attach_adapter(loaded, config.lora, seed=config.run.seed).model.train()
    rows, size = RowDataset(data.train), config.train.per_device_train_batch_size
    collate = Collator(loaded.tokenizer.pad_token_id, padding_multiple(loaded.device))
    order = epoch_order(
        data.train.lengths, seed=1, epoch=0, batch_size=size, group_by_length=config.train.group_by_length
    )
    optimizer = torch.optim.AdamW(trainable_state(model).values(), lr=config.train.learning_rate)

    def step(number: int) -> float:
        """Take one step and return its tokens a second."""
        batch = collate([rows[row] for row in order[number * size : (number + 1) * size]])
        started, num_tokens = time.perf_counter(), int(batch["attention_mask"].sum())
        batch = {name: tensor.to(loaded.device) for name, tensor in batch.items() if name != "row"}
        with torch.autocast(loaded.device.type, loaded.compute_dtype, enabled=loaded.compute_dtype != torch.float32):
            loss = label_losses(model, **batch).nats.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable_state(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loaded.device.type == "cuda":
            torch.cuda.synchronize()
        return num_tokens / (time.perf_counter() - started)

    speeds = measured(model, step, options.rounds, loaded.device)
    print(f"{torch.get_num_threads()} threads, {loaded.device}, {loaded.compute_dtype}, {options.rounds} rounds")
    for path in PATHS:
        ratios = [fast / plain for fast, plain in zip(speeds[path], speeds["plain"], strict=True)]
        print(f"{path:20} {statistics.median(speeds[path]):7.0f} tokens/s  {statistics.median(ratios):.2f} x plain")


def measured(
    model: torch.nn.Module, step: Callable[[int], float], num_rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the speeds of every path, in rounds of one step each; a round before them warms up."""
    tokens = torch.arange(1, 9, device=device)[None]
    speeds: dict[str, list[float]] = {path: [] for path in PATHS}
    for number in range(num_rounds + 1):
        found = [step(number)]
        fast = install(model, lambda: label_losses(model, input_ids=tokens, labels=tokens))
        found.append(step(number))
        for weight in fast.weights:
            weight.keep()
        found.append(step(number))
        fast.uninstall()
        for path, speed in zip(PATHS, found, strict=True):
            speeds[path] += [speed] if number else []
    return speeds


if __name__ == "__main__":
    main()
