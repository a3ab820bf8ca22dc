"""Time training steps of a config on this machine, in each way that a run may take: plain, fast, and so on.

All take the same rows in turn, in one process, as a run of the config would: packed or padded, recomputing activations or
not, with as many micro-batches a step. Tokens are those of the rows. Ratios are medians over rounds. Rows lie end to end
where a run would lay them so; with ``train.fp8=true`` forward products are in float8 too, where the device has them.

Example: ``GOMP_SPINCOUNT=20000 python scripts/bench_step.py configs/demo.yaml``
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
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
from qlora_train.kernels import document_attention
from qlora_train.kernels.fast_path import install
from qlora_train.kernels.float8 import why_not_on
from qlora_train.loader import load_model
from qlora_train.loss import IGNORED, chunk_tokens_of, label_losses
from qlora_train.pipeline import prepare
from qlora_train.trainer.feed import Feed, RowFeed, make_feed
from qlora_train.trainer.isolation import isolate_documents
from qlora_train.trainer.padding_free import choose_padding_free
from qlora_train.trainer.recompute import Recomputation, choose_recomputation


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
    chunk_tokens = chunk_tokens_of(model)
    feeds = feeds_of(adapted, data, config, in_chunks=chunk_tokens is not None)
    steps = [list(islice(feed.loader(Start()), options.rounds + 1)) for feed in feeds]
    if len(steps[0]) <= options.rounds:
        parser.error(f"--rounds {options.rounds}: an epoch has {len(steps[0])} steps, and one warms up; ask for fewer")
    optimizer = torch.optim.AdamW(trainable_state(model).values(), lr=config.train.learning_rate, fused=True)

    def step(number: int, *, end_to_end: bool = False) -> float:
        """Take one step and return its tokens a second."""
        loaded.model.set_attn_implementation(document_attention.NAME if end_to_end else apart)
        num_tokens = sum(map(feeds[0].num_tokens, steps[0][number]))
        num_labels = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in steps[end_to_end][number])
        started = time.perf_counter()
        for each in steps[end_to_end][number]:
            batch = {name: tensor.to(loaded.device) for name, tensor in each.items() if name != "row"}
            with torch.autocast(
                loaded.device.type, loaded.compute_dtype, enabled=loaded.compute_dtype != torch.float32
            ):
                loss = label_losses(model, chunk_tokens, **batch).nats.sum() / num_labels
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable_state(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loaded.device.type == "cuda":
            torch.cuda.synchronize()
        return num_tokens / (time.perf_counter() - started)

    in_float8 = config.train.fp8 and has_float8(loaded.device)
    speeds = measured(model, step, options.rounds, loaded.device, in_float8=in_float8, end_to_end=len(feeds) > 1)
    print(f"{torch.get_num_threads()} threads, {loaded.device}, {loaded.compute_dtype}, {options.rounds} rounds")
    for path in speeds:
        ratios = [fast / plain for fast, plain in zip(speeds[path], speeds["plain"], strict=True)]
        print(f"{path:20} {statistics.median(speeds[path]):7.0f} tokens/s  {statistics.median(ratios):.2f} x plain")
    if options.output:
        about = {"device": str(loaded.device), "threads": torch.get_num_threads(), "tokens_per_second": speeds}
        options.output.write_text(json.dumps(about, indent=1) + "\n")


def has_float8(device: torch.device) -> bool:
    """Say whether a device multiplies float8, and, where it does not, print why."""
    problem = why_not_on(device)
    if problem:
        print(f"no float8 on {device}: {problem}")
    return not problem


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


def feeds_of(adapted: AdaptedModel, data: PreparedData, config: RunConfig, *, in_chunks: bool) -> list[Feed]:
    """Return the steps of a run of the config, and, where it lays its rows end to end, the same so."""
    size, loaded = config.train.per_device_train_batch_size, adapted.loaded
    feed = make_feed(data.train, config, loaded.tokenizer.pad_token_id, loaded.device, grouped_rows=size)
    if not isinstance(feed, RowFeed):
        return [feed]
    with tempfile.TemporaryDirectory() as nowhere:
        run = RunFolder(Path(nowhere))
        found = choose_padding_free(adapted, feed, config, run, balances=False, in_chunks=in_chunks)
    return [feed] if found is None else [feed, found]


def measured(
    model: torch.nn.Module,
    step: Callable[..., float],
    num_rounds: int,
    device: torch.device,
    *,
    in_float8: bool,
    end_to_end: bool,
) -> dict[str, list[float]]:
    """Return the speeds of every path, in rounds of one step each; a round before them warms up."""
    tokens = torch.arange(1, 9, device=device)[None]
    speeds: dict[str, list[float]] = defaultdict(list)
    for number in range(num_rounds + 1):
        found = {"plain": step(number)}
        fast = install(model, lambda: label_losses(model, input_ids=tokens, labels=tokens))
        found["fast"] = step(number)
        for weight in fast.weights:
            weight.keep()
        found["fast, kept weights"] = step(number)
        if end_to_end:
            found["and padding-free"] = step(number, end_to_end=True)
        if in_float8:
            for weight in fast.weights:
                weight.multiplies_in_float8 = weight.has_float8
                weight.keep()
            found["and in float8"] = step(number, end_to_end=end_to_end)
        fast.uninstall()
        for path, speed in found.items() if number else ():
            speeds[path].append(speed)
    return speeds


if __name__ == "__main__":
    main()
