"""Time training steps of a config on this machine: the plain path, the fast path, with kept weights, with shared prefixes.

All take the same rows in turn, in one process, as a run of the config would: packed or padded, recomputing activations or
not, but one micro-batch a step. Tokens are those of the rows. Ratios are medians over rounds. Prefixes are shared where a
run would share them.

Example: ``GOMP_SPINCOUNT=20000 python scripts/bench_step.py configs/demo.yaml``
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from transformers import TrainerState

from qlora_train.adapter import AdaptedModel, attach_adapter, trainable_state
from qlora_train.checkpoint import RunFolder
from qlora_train.config import RunConfig, load_config
from qlora_train.data import PreparedData
from qlora_train.data.batches import PackCollator, row_multiple
from qlora_train.kernels import document_attention
from qlora_train.kernels.fast_path import install
from qlora_train.loader import load_model
from qlora_train.loss import chunk_tokens_of, label_losses
from qlora_train.pipeline import prepare
from qlora_train.trainer.feed import Feed, RowFeed, make_feed
from qlora_train.trainer.isolation import isolate_documents
from qlora_train.trainer.prefixes import choose_prefix_sharing
from qlora_train.trainer.recompute import Recomputation, choose_recomputation

PATHS = ("plain", "fast", "fast, kept weights", "and shared prefixes")


@dataclass
class Start:
    """A run that has taken no step, as a feed sees it."""

    state: TrainerState = field(default_factory=TrainerState)


def main() -> None:
    """Print tokens a second and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, help="a file of JSON for what was measured")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    with tempfile.TemporaryDirectory() as nowhere:
        source, data = prepare(config, RunFolder(Path(nowhere)))
    loaded = load_model(config.model, config.quantization, source=source)
    adapted = attach_adapter(loaded, config.lora, seed=config.run.seed)
    model = adapted.model.train()
    set_up(adapted, data, config)
    apart = loaded.model.config._attn_implementation
    feeds = feeds_of(adapted, data, config)
    batches = [list(islice(feed.loader(Start()), options.rounds + 1)) for feed in feeds]
    if len(batches[0]) <= options.rounds:
        parser.error(
            f"--rounds {options.rounds}: the data has {len(batches[0])} batches, and one warms up; ask for fewer"
        )
    chunk_tokens = chunk_tokens_of(model)
    optimizer = torch.optim.AdamW(trainable_state(model).values(), lr=config.train.learning_rate, fused=True)

    def step(number: int, *, shares: bool = False) -> float:
        """Take one step and return its tokens a second."""
        loaded.model.set_attn_implementation(document_attention.NAME if shares else apart)
        batch = {name: tensor for name, tensor in batches[shares][number].items() if name != "row"}
        num_tokens = feeds[0].num_tokens(batches[0][number])
        started = time.perf_counter()
        batch = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
        with torch.autocast(loaded.device.type, loaded.compute_dtype, enabled=loaded.compute_dtype != torch.float32):
            loss = label_losses(model, chunk_tokens, **batch).nats.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable_state(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loaded.device.type == "cuda":
            torch.cuda.synchronize()
        return num_tokens / (time.perf_counter() - started)

    speeds = measured(model, step, options.rounds, loaded.device, shares=len(batches) > 1)
    print(f"{torch.get_num_threads()} threads, {loaded.device}, {loaded.compute_dtype}, {options.rounds} rounds")
    for path in speeds:
        ratios = [fast / plain for fast, plain in zip(speeds[path], speeds["plain"], strict=True)]
        print(f"{path:20} {statistics.median(speeds[path]):7.0f} tokens/s  {statistics.median(ratios):.2f} x plain")
    if options.output:
        about = {"device": str(loaded.device), "threads": torch.get_num_threads(), "tokens_per_second": speeds}
        options.output.write_text(json.dumps(about, indent=1) + "\n")


def set_up(adapted: AdaptedModel, data: PreparedData, config: RunConfig) -> None:
    """Let the model attend and recompute as in a run of the config."""
    if config.data.packing:
        isolate_documents(adapted, config, data.train)
    loaded, layers = adapted.loaded, Recomputation(adapted.model, [])
    level, checkpoints_all = choose_recomputation(
        config.train,
        layers,
        on_gpu=loaded.device.type == "cuda",
        supported=loaded.model.supports_gradient_checkpointing,
    )
    layers.set(level)
    if checkpoints_all:
        adapted.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def feeds_of(adapted: AdaptedModel, data: PreparedData, config: RunConfig) -> list[Feed]:
    """Return the micro-batches of a run of the config, and, where it shares prefixes, the same so."""
    size, loaded = config.train.per_device_train_batch_size, adapted.loaded
    feed = make_feed(data.train, config, loaded.tokenizer.pad_token_id, loaded.device, grouped_rows=size)
    if not isinstance(feed, RowFeed):
        return [feed]
    with tempfile.TemporaryDirectory() as nowhere:
        shares = choose_prefix_sharing(adapted, feed, config, RunFolder(Path(nowhere)), balances=False)
    collate = PackCollator(loaded.tokenizer.pad_token_id, row_multiple(loaded.device), shares)
    return [feed, feed.with_collator(collate)] if shares else [feed]


def measured(
    model: torch.nn.Module, step: Callable[..., float], num_rounds: int, device: torch.device, *, shares: bool
) -> dict[str, list[float]]:
    """Return the speeds of every path, in rounds of one step each; a round before them warms up."""
    tokens = torch.arange(1, 9, device=device)[None]
    speeds: dict[str, list[float]] = {path: [] for path in PATHS[: 3 + shares]}
    for number in range(num_rounds + 1):
        found = [step(number)]
        fast = install(model, lambda: label_losses(model, input_ids=tokens, labels=tokens))
        found.append(step(number))
        for weight in fast.weights:
            weight.keep()
        found.append(step(number))
        if shares:
            found.append(step(number, shares=True))
        fast.uninstall()
        for path, speed in zip(speeds, found, strict=True):
            speeds[path] += [speed] if number else []
    return speeds


if __name__ == "__main__":
    main()
