"""Bytes, operations and time of an optimizer step of 70B models on several GPUs, computed without any.

With N ranks, S bytes of frozen weights in shards and A bytes of float32 adapter gradients, a rank sends per step

- fsdp, per micro-batch: S (N - 1) / N for the forward pass and again for the backward pass (ring all-gather);
- ddp and fsdp: 2 A (N - 1) / N once (ring all-reduce), after the last micro-batch, so that nothing hides it.

The time of a step is max(compute, gathers) + all-reduce: the next layer is gathered while this one computes. Memory is
that of `planning/memory.py`, with the base divided by N under fsdp, and the units that are whole at the peak: the root
(embedding and head) and two layers, the one that computes and the one that is gathered ahead. Norms, adapter, gradients
and optimizer are replicated. Tests hold the bytes against those of real models and runs.

Assumed, not measured: `CLUSTERS` and `UTILIZATION`. A GB is 10**9 bytes; GPU memory is in GiB, as sold.

Example::

    PYTHONPATH=. python scripts/scaling_plan.py > benchmarks/results/scaling-plan.txt
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from model_flops import StepFlops, model_shape, step_flops

from qlora_train.config import LoraSection
from qlora_train.planning.held_memory import adapter_numel, base_parts, optimizer_bytes, trained_tensors
from qlora_train.planning.memory import step_parts, step_settings
from qlora_train.planning.run_plan import model_shapes
from qlora_train.planning.shard_bytes import FrozenBytes, frozen_bytes

GIB = 2**30
RANK = 16
ROWS_PER_STEP = 64
TOKENS_PER_ROW = 1024
"""A micro-batch is one row, recomputed in full in the backward pass."""
ROW_STEP, MAX_ROW = 128, 16_384
UTILIZATION = 0.4
"""Share of the GPU's dense bfloat16 peak that a step reaches, dequantization of NF4 and recomputation included."""
RESERVED_BYTES = 1.5e9
"""Of each GPU, for the CUDA context, NCCL's buffers and fragmentation."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPUs of one kind.

    Attributes:
        flops: dense bfloat16 operations per second of one GPU, by its data sheet.
        bus_bytes: bytes per second that a rank of a ring sends ("bus bandwidth" of nccl-tests).
    """

    name: str
    num_gpus: int
    gpu_gib: int
    flops: float
    bus_bytes: float


CLUSTERS = (
    Cluster("2 x 24 GB, PCIe 4 without peer-to-peer", 2, 24, 165e12, 10e9),
    Cluster("8 x 24 GB, PCIe 4 without peer-to-peer", 8, 24, 165e12, 10e9),
    Cluster("8 x 80 GB, NVLink", 8, 80, 989e12, 350e9),
    Cluster("64 x 80 GB, 8 x 400 Gb/s per machine", 64, 80, 989e12, 300e9),
    Cluster("64 x 80 GB, 100 Gb/s per machine", 64, 80, 989e12, 10e9),
)
_LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-70B": _LLAMA_70B | {"vocab_size": 32000},
    "Llama-3.3-70B": _LLAMA_70B | {"vocab_size": 128256},
}


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank holds, sends and computes.

    Attributes:
        base_bytes: its share of the frozen base.
        trained_bytes: adapter and optimizer state.
        gathered_bytes: units that are whole at the peak.
        step_bytes: gradients and activations at the peak.
        gather_bytes: sent for all-gathers per step.
        reduce_bytes: sent for the all-reduce per step.
    """

    base_bytes: float
    trained_bytes: int
    gathered_bytes: float
    step_bytes: int
    gather_bytes: float
    reduce_bytes: float
    compute_seconds: float
    gather_seconds: float
    reduce_seconds: float

    @property
    def total_bytes(self) -> float:
        """Peak of the rank."""
        return self.base_bytes + self.trained_bytes + self.gathered_bytes + self.step_bytes

    @property
    def seconds(self) -> float:
        """Time of an optimizer step."""
        return max(self.compute_seconds, self.gather_seconds) + self.reduce_seconds


def gather_bytes(frozen: FrozenBytes, *, num_ranks: int, num_micro_batches: int) -> float:
    """Return the bytes that a rank sends per step to gather frozen weights.

    Layers are gathered in both passes; the root stays whole from the forward to the backward pass.
    """
    per_micro_batch = 2 * frozen.num_layers * frozen.layer + frozen.root
    return num_micro_batches * per_micro_batch * (num_ranks - 1) / num_ranks


def reduce_bytes(adapter_numel: int, *, num_ranks: int) -> float:
    """Return the bytes that a rank sends per step to sum the float32 gradients of the adapter."""
    return 2 * 4 * adapter_numel * (num_ranks - 1) / num_ranks


def executed_flops(flops: StepFlops) -> float:
    """Return the operations of a step whose decoder layers are computed again in the backward pass."""
    return flops.total + flops.base / 2 + flops.adapter / 3 + flops.attention / 3


def rank_plan(
    config_json: Mapping[str, Any], cluster: Cluster, strategy: str, tokens: int = TOKENS_PER_ROW
) -> RankPlan:
    """Plan one rank of a 70B run on rows of `tokens`, with LoRA on every linear layer and the loss in chunks."""
    num_ranks = cluster.num_gpus
    num_micro_batches = math.ceil(ROWS_PER_STEP / num_ranks)
    model = model_shapes(config_json, LoraSection(r=RANK))
    settings = replace(
        step_settings(
            model, r=RANK, num_tokens=tokens, gpu_bytes=cluster.gpu_gib * GIB, accumulates=num_micro_batches > 1
        ),
        num_ranks=num_ranks if strategy == "fsdp" else 1,
    )
    shape = model_shape(config_json)
    flops = step_flops(shape, r=RANK, row_lengths=[tokens], num_labels=tokens)
    frozen = frozen_bytes(model)
    sharded = strategy == "fsdp"
    gathered = gather_bytes(frozen, num_ranks=num_ranks, num_micro_batches=num_micro_batches) if sharded else 0
    reduced = reduce_bytes(adapter_numel(model, settings), num_ranks=num_ranks)
    peak = max(step_parts(model, settings), key=lambda parts: sum(parts.values()))
    whole = peak.pop("gathered weights", 0)
    return RankPlan(
        base_bytes=sum(base_parts(model, settings).values()),
        trained_bytes=4 * adapter_numel(model, settings)
        + optimizer_bytes(settings.optimizer, trained_tensors(model, settings)),
        gathered_bytes=whole,
        step_bytes=sum(peak.values()),
        gather_bytes=gathered,
        reduce_bytes=reduced,
        compute_seconds=num_micro_batches * executed_flops(flops) / (cluster.flops * UTILIZATION),
        gather_seconds=gathered / cluster.bus_bytes,
        reduce_seconds=reduced / cluster.bus_bytes,
    )


def longest_row(config_json: Mapping[str, Any], cluster: Cluster, strategy: str) -> int:
    """Return the most tokens, in steps of `ROW_STEP`, that a row may have; 0 if no row fits, at most `MAX_ROW`."""
    budget_bytes = cluster.gpu_gib * GIB - RESERVED_BYTES
    sizes = range(ROW_STEP, MAX_ROW + 1, ROW_STEP)

    def too_long(tokens: int) -> bool:
        return rank_plan(config_json, cluster, strategy, tokens).total_bytes > budget_bytes

    return ROW_STEP * bisect.bisect_left(sizes, True, key=too_long)


def line(cluster: Cluster, strategy: str, plan: RankPlan, max_tokens: int) -> str:
    """Return a row of the table."""
    held = (plan.base_bytes, plan.gathered_bytes, plan.trained_bytes, plan.step_bytes, plan.total_bytes)
    bound = "gathers" if plan.gather_seconds > plan.compute_seconds else "compute"
    return (
        f"{cluster.name:39} {strategy:8}"
        + "".join(f" {number / 1e9:8.1f}" for number in held)
        + f" {max_tokens or 'none':>7} {(plan.gather_bytes + plan.reduce_bytes) / 1e9:8.1f}"
        + f" {plan.compute_seconds:9.1f} {plan.gather_seconds + plan.reduce_seconds:7.1f}"
        + f" {plan.seconds:7.1f} {ROWS_PER_STEP * TOKENS_PER_ROW / plan.seconds:9.0f}  {bound}"
    )


def main() -> None:
    """Print a table per model."""
    print(f"{ROWS_PER_STEP} rows of {TOKENS_PER_ROW} tokens per optimizer step, one row per micro-batch, r = {RANK};")
    print(f"assumed: {UTILIZATION:.0%} of the bfloat16 peak, {RESERVED_BYTES / 1e9:.1f} GB per GPU reserved, and")
    for cluster in CLUSTERS:
        rates = f"{cluster.flops / 1e12:.0f} TFLOP/s, {cluster.bus_bytes / 1e9:.0f} GB/s between ranks"
        print(f"  {cluster.name}: {rates}")
    titles = ("base", "gathered", "trained", "step", "total")
    heading = f"{'':48}" + "".join(f" {title:>8}" for title in titles)
    heading += f" {'max row':>7} {'sent':>8} {'compute s':>9} {'links s':>7} {'step s':>7} {'tokens/s':>9}  bound by"
    for name, config_json in MODELS.items():
        flops = step_flops(model_shape(config_json), r=RANK, row_lengths=[TOKENS_PER_ROW], num_labels=TOKENS_PER_ROW)
        print(f"\n{name}, GB per rank, {ROWS_PER_STEP * executed_flops(flops):.2e} operations per step\n{heading}")
        for cluster in CLUSTERS:
            for strategy in ("ddp", "fsdp"):
                plan, most = (function(config_json, cluster, strategy) for function in (rank_plan, longest_row))
                print(line(cluster, strategy, plan, most))


if __name__ == "__main__":
    main()
