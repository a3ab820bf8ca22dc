"""Rehearse a config on several GPUs without one: memory and bytes sent of a rank, on fake tensors and a fake process group.

The product's own functions shard the base and compute a step's forward and backward passes, in one process that stands for
rank 0, whose part is the largest; nothing is computed or sent. Memory is counted as by `count_memory.py`, with the same
limits, and what FSDP allocates and frees. Micro-batches have as many rows and tokens as the config allows, layers are
recomputed unless the config says otherwise, and the optimizer's state counts as resident. Memory and bytes are straight
lines of the number of layers: they are counted at two depths.

A ring sends (N - 1) / N of what is gathered and 2 (N - 1) / N of what is summed. A GB is 10**9 bytes.

Example: ``PYTHONPATH=. python scripts/rehearse.py configs/llama70b.yaml --gpus 8``
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from bitsandbytes import functional
from count_memory import DEVICE, Fake4bit, GpuBytes, batch_of, fake_gpu, materialise, trainer_of
from peft import LoraConfig, get_peft_model
from scaling_plan import reduce_bytes
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from qlora_train.adapters import choose_targets, find_linears, trainable_state
from qlora_train.architectures import detect
from qlora_train.config import RunConfig, load_config
from qlora_train.kernels.install import install
from qlora_train.models import resolve_base, shard_base
from qlora_train.models.moe import expert_parameters
from qlora_train.models.text_only import text_model
from qlora_train.objectives.label_losses import label_losses
from qlora_train.parallel.context import Context, context, set_context
from qlora_train.training.memory import memory_probe
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing
from qlora_train.utils.errors import ConfigError, UserError
from tests.support.counted_collectives import CollectiveBytes

DEPTHS = (2, 4)
STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True, slots=True)
class RankBytes:
    """What rank 0 holds and sends.

    Attributes:
        weights: base and adapter, before the first step.
        peak: of a step.
        gathered: whole size of what a micro-batch gathers.
        adapter_numel: trained numbers.
    """

    weights: float
    peak: float
    gathered: float
    adapter_numel: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per strategy; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", type=int, required=True)
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        print("\n".join(rehearse(config, resolve_base(config.model, weights=False).config, options.gpus)))
    except UserError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return 2
    return 0


def rehearse(config: RunConfig, config_json: Mapping[str, Any], num_ranks: int) -> Iterator[str]:
    """Yield the lines of the table.

    Raises:
        ConfigError: a mixture of experts, or pairs, whose reference pass is not counted.
    """
    if config.train.objective != "sft":
        raise ConfigError(
            f"rehearse: counts steps of sft, and train.objective is {config.train.objective}; add train.objective=sft"
        )
    num_rows = math.ceil(
        config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps / num_ranks
    )
    rows = min(num_rows, config.train.per_device_train_batch_size)
    num_micro_batches = math.ceil(num_rows / rows)
    yield f"rank 0 of {num_ranks}: {num_micro_batches} micro-batches of {rows} x {config.data.max_length} tokens per step"
    share = (num_ranks - 1) / num_ranks
    with fake_ranks(num_ranks):
        for strategy in STRATEGIES:
            counted = count_at_full_depth(config, config_json, strategy, rows, num_micro_batches)
            gathered = num_micro_batches * share * counted.gathered
            summed = reduce_bytes(round(counted.adapter_numel), num_ranks=num_ranks)
            yield (
                f"{strategy:4}: weights {counted.weights / 1e9:.2f} GB, peak {counted.peak / 1e9:.2f} GB; sent per step: "
                f"{gathered / 1e9:.2f} GB of weights, {summed / 1e9:.3f} GB of gradients"
            )


@contextmanager
def fake_ranks(num_ranks: int) -> Iterator[None]:
    """Make this process rank 0 of several that do not exist."""
    before, this = context(), Context()
    this.world_size = this.local_world_size = num_ranks
    distributed.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    set_context(this)
    try:
        yield
    finally:
        set_context(before)
        distributed.destroy_process_group()


def count_at_full_depth(
    config: RunConfig, config_json: Mapping[str, Any], strategy: str, rows: int, num_micro_batches: int
) -> RankBytes:
    """Count two depths and extend them to that of the model."""
    name = "num_hidden_layers"
    low, high = (count(config, {**config_json, name: depth}, strategy, rows, num_micro_batches) for depth in DEPTHS)
    more = (config_json[name] - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return RankBytes(
        *(
            getattr(low, field) + more * (getattr(high, field) - getattr(low, field))
            for field in RankBytes.__dataclass_fields__
        )
    )


def count(
    config: RunConfig, config_json: Mapping[str, Any], strategy: str, rows: int, num_micro_batches: int
) -> RankBytes:
    """Count rank 0's step on a model of full width."""
    base, targets = meta_base(config, config_json)
    mesh = init_device_mesh(DEVICE.type, (context().world_size,))
    with fake_gpu() as live, counting_fsdp(live):
        materialise(base)
        if strategy == "fsdp":
            with mock.patch.object(shard_base, "init_device_mesh", return_value=mesh):  # which needs real tensors
                shard_base.shard_base(base, DEVICE, {}, check_bytes=False)
            for layer in filter(lambda module: isinstance(module, Fake4bit), base.modules()):
                layer.state = layer.quant_state  # without the whole absmax
        model = with_adapter(base, config, targets)
        weights = live.live
        loaded = SimpleNamespace(model=model.get_base_model(), compute_dtype=torch.bfloat16, device=DEVICE)
        adapted: Any = SimpleNamespace(model=model, loaded=loaded)
        fused = install(model, lambda: label_losses(model, **batch_of(1, 8)))
        level = config.train.gradient_checkpointing
        LayerCheckpointing(model, fused.mlps).set("full" if level == "auto" else level)
        trainer = trainer_of(adapted, min(2, num_micro_batches))
        for unit in filter(lambda module: isinstance(module, FSDPModule), model.modules()):
            unit.reshard()  # the forward passes of the set-up leave the root gathered
        live.peak = live.live
        with CollectiveBytes() as collectives:
            memory_probe._train(trainer, model, [batch_of(rows, config.data.max_length)])
        adapter_numel = sum(parameter.numel() for parameter in trainable_state(model).values())
        return RankBytes(weights, live.peak, collectives.gathered / min(2, num_micro_batches), adapter_numel)


def meta_base(config: RunConfig, config_json: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a base on the meta device with 4-bit layers, and the target modules of the adapter.

    Raises:
        ConfigError: a mixture of experts.
    """
    functional.quantize_4bit(torch.zeros(1, 64), compress_statistics=True)  # its table of a process must be a real one
    architecture = detect(config_json)
    settings = {key: value for key, value in config_json.items() if key != "model_type"}
    with torch.device("meta"):
        found = AutoConfig.for_model(config_json["model_type"], **settings)
        found.dtype = torch.bfloat16
        base = text_model(found).build(found).to(torch.bfloat16)
        if expert_parameters(base):
            raise ConfigError("rehearse: experts are not counted; give the config of a dense model")
        linears = find_linears(base)
        targets = choose_targets(base, linears, config.lora, architecture)
        for name, linear in linears.items():
            parent, _, leaf = name.rpartition(".")
            if leaf not in architecture.keep_16bit:
                setattr(base.get_submodule(parent), leaf, Fake4bit(linear))
    base.requires_grad_(False)
    base.is_loaded_in_4bit = True
    return base, targets


def with_adapter(base: Any, config: RunConfig, targets: Any) -> Any:
    """Attach an adapter of fake float32 tensors."""
    lora = LoraConfig(r=config.lora.r, task_type="CAUSAL_LM", target_modules=targets)
    # moving a fake layer to its own device replaces its parameters, and fails
    with mock.patch.object(nn.Module, "to", lambda module, *_arguments, **_keywords: module):
        return get_peft_model(base, lora, autocast_adapter_dtype=False)


@contextmanager
def counting_fsdp(live: GpuBytes) -> Iterator[None]:
    """Count the storages that FSDP resizes: whole weights have no bytes between their uses."""

    def resized(function: Any) -> Any:
        def call(tensor: Tensor) -> None:
            function(tensor)
            live.resize(tensor.untyped_storage())

        return call

    alloc, free = resized(_fsdp_param.alloc_storage), resized(_fsdp_param.free_storage)
    with ExitStack() as stack:
        for module in (_fsdp_param, _fsdp_param_group):
            stack.enter_context(mock.patch.object(module, "alloc_storage", alloc))
        stack.enter_context(mock.patch.object(_fsdp_param, "free_storage", free))
        yield


if __name__ == "__main__":
    sys.exit(main())
