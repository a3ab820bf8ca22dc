"""Time training steps of a config on this machine: the reference, fused kernels, dequantized weights, padding-free.

All take the same rows in turn, in one process, as a run of the config would: packed or padded, with its activation
checkpointing and its micro-batches per step. Padding is not counted. Ratios are medians over rounds. If the config has LoRA
dropout, the last way is repeated without it.

Example: ``GOMP_SPINCOUNT=20000 python scripts/bench_step.py configs/demo.yaml``, as a run on free CPUs sets it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerState

from qlora_train.adapters import AdaptedModel, attach_adapter, trainable_state
from qlora_train.config import RunConfig, load_config
from qlora_train.data import PreparedData
from qlora_train.kernels.install import FusedKernels, install
from qlora_train.kernels.lora_dropout import lora_dropout_off, rate_of
from qlora_train.kernels.packed import attention
from qlora_train.models import load_model
from qlora_train.objectives.label_losses import choose_chunk_tokens, label_losses
from qlora_train.planning.base_and_data import prepare
from qlora_train.runs import RunFolder
from qlora_train.training.batch_source import BatchSource, RowBatches, make_batch_source
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing, choose_checkpointing
from qlora_train.training.padding_free import choose_padding_free
from qlora_train.training.parity.document_isolation import isolate_documents
from qlora_train.utils.constants import IGNORE_INDEX


@dataclass
class Start:
    """A run that has taken no step, as a batch source sees it."""

    state: TrainerState = field(default_factory=TrainerState)


class Steps:
    """The first optimizer steps of a run of a config, to be taken in any order and way.

    Attributes:
        model: in training mode, with its adapter; fused kernels are not installed.
        end_to_end: whether a run of the config would train padding-free.
    """

    def __init__(self, config: RunConfig, num_steps: int) -> None:
        with tempfile.TemporaryDirectory() as nowhere:
            source, data = prepare(config, RunFolder(Path(nowhere)))
        self.loaded = load_model(config.model, config.quantization, source=source)
        adapted = attach_adapter(self.loaded, config.lora, seed=config.run.seed)
        self.model = adapted.model.train()
        set_up(adapted, data, config)
        self._attention = self.loaded.model.config._attn_implementation
        self._chunk_tokens = choose_chunk_tokens(self.model)
        self._sources = batch_sources(adapted, data, config, chunked_loss=self._chunk_tokens is not None)
        self._batches = [list(islice(source.loader(Start()), num_steps)) for source in self._sources]
        self._optimizer = torch.optim.AdamW(
            trainable_state(self.model).values(), lr=config.train.learning_rate, fused=True
        )
        self.end_to_end = len(self._sources) > 1

    def __len__(self) -> int:
        return len(self._batches[0])

    def batches(self, number: int) -> list[dict[str, torch.Tensor]]:
        """Return the micro-batches of a step as the config asks for them."""
        return self._batches[0][number]

    def install(self) -> FusedKernels:
        """Install the fused kernels."""
        tokens = torch.arange(1, 9, device=self.loaded.device)[None]
        return install(self.model, lambda: label_losses(self.model, input_ids=tokens, labels=tokens))

    def take(self, number: int, *, end_to_end: bool = False) -> float:
        """Take one step and return its tokens per second; padding is not counted."""
        device, dtype = self.loaded.device, self.loaded.compute_dtype
        self.loaded.model.set_attn_implementation(attention.NAME if end_to_end else self._attention)
        num_tokens = sum(map(self._sources[0].num_tokens, self._batches[0][number]))
        batches = self._batches[end_to_end][number]
        num_labels = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
        started = time.perf_counter()
        for each in batches:
            batch = {name: tensor.to(device) for name, tensor in each.items() if name != "row"}
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = label_losses(self.model, self._chunk_tokens, **batch).nll.sum() / num_labels
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable_state(self.model).values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return num_tokens / (time.perf_counter() - started)


def main() -> None:
    """Print tokens per second and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, help="a file of JSON for what was measured")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    steps = Steps(config, options.rounds + 1)
    if len(steps) <= options.rounds:
        parser.error(f"--rounds {options.rounds}: an epoch has {len(steps)} steps, and one warms up; ask for fewer")
    loaded = steps.loaded
    speeds = measured(steps, options.rounds)
    print(f"{torch.get_num_threads()} threads, {loaded.device}, {loaded.compute_dtype}, {options.rounds} rounds")
    for path in speeds:
        ratios = [speed / slowest for speed, slowest in zip(speeds[path], speeds["reference"], strict=True)]
        print(f"{path:24} {statistics.median(speeds[path]):7.0f} tokens/s  {statistics.median(ratios):.2f} x reference")
    if options.output:
        about = {"device": str(loaded.device), "threads": torch.get_num_threads(), "tokens_per_second": speeds}
        options.output.write_text(json.dumps(about, indent=1) + "\n")


def set_up(adapted: AdaptedModel, data: PreparedData, config: RunConfig) -> None:
    """Let the model attend and recompute as in a run of the config."""
    if config.data.packing:
        isolate_documents(adapted, config, data.train)
    loaded, layers = adapted.loaded, LayerCheckpointing(adapted.model, [])
    checkpoints_all = choose_checkpointing(
        config.train,
        layers,
        on_gpu=loaded.device.type == "cuda",
        supported=loaded.model.supports_gradient_checkpointing,
    )
    if checkpoints_all:
        adapted.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def batch_sources(
    adapted: AdaptedModel, data: PreparedData, config: RunConfig, *, chunked_loss: bool
) -> list[BatchSource]:
    """Return the steps of a run of the config, padded and, if it trains padding-free, flattened."""
    size, loaded = config.train.per_device_train_batch_size, adapted.loaded
    source = make_batch_source(data.train, config, loaded.tokenizer.pad_token_id, loaded.device, group_batch_size=size)
    if not isinstance(source, RowBatches):
        return [source]
    with tempfile.TemporaryDirectory() as nowhere:
        run = RunFolder(Path(nowhere))
        flattened = choose_padding_free(adapted, source, config, run, has_router_loss=False, chunked_loss=chunked_loss)
    return [source] if flattened is None else [source, flattened]


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """Yield the adapted layers of a model."""
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def measured(steps: Steps, num_rounds: int) -> dict[str, list[float]]:
    """Return the speeds of every way, in rounds of one step each, after a round of warm-up."""
    speeds: dict[str, list[float]] = defaultdict(list)
    for number in range(num_rounds + 1):
        found = {"reference": steps.take(number)}
        fast = steps.install()
        found["fused kernels"] = steps.take(number)
        for weight in fast.weights:
            weight.cache()
        found["+ dequantized weights"] = steps.take(number)
        if steps.end_to_end:
            steps.take(number, end_to_end=True)  # a CPU makes kernels for new lengths
            found["+ padding-free"] = steps.take(number, end_to_end=True)
        if any(rate_of(layer, name) for layer in lora_layers(steps.model) for name in layer.active_adapters):
            with lora_dropout_off(steps.model.modules()):
                found["- LoRA dropout"] = steps.take(number, end_to_end=steps.end_to_end)
        fast.uninstall()
        for path, speed in found.items() if number else ():
            speeds[path].append(speed)
    return speeds


if __name__ == "__main__":
    main()
