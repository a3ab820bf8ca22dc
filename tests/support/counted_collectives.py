"""Counts the bytes of collectives, and what the tests of them run on each rank."""

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_train.adapters import trainable_state
from qlora_train.config import RunConfig
from qlora_train.evaluation.objective_table import make_objective
from qlora_train.kernels.checkpointing_levels import CheckpointingLevel
from qlora_train.kernels.install import install
from qlora_train.objectives.label_losses import label_losses
from qlora_train.parallel import context
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing
from tests.support.batches import BATCH
from tests.support.runs import make_config
from tests.support.sharded_models import adapted, load
from tests.support.trainers import trainer_of


class CollectiveBytes(TorchDispatchMode):
    """Adds up the sizes of what all-gathers return and all-reduces sum.

    Attributes:
        gathered: bytes of all ranks together.
        summed: bytes of float32 tensors; those of other types are flags and counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.summed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes
        elif func is torch.ops.c10d.allreduce_.default:
            self.summed += sum(tensor.nbytes for tensor in args[0] if tensor.dtype == torch.float32)
        return func(*args, **(kwargs or {}))


PAIR = {name: tensor[:2] for name, tensor in BATCH.items()} | {
    "row": torch.tensor([0, 0]), "sequence": torch.tensor([0, 1]), "num_labels": torch.tensor([19, 19]),
}  # fmt: skip
"""The first two rows of the batch as a preference pair; nothing predicts the first token of a row."""


def gathered_bytes(
    folder: Path, base: Path, level: CheckpointingLevel, num_micro_batches: int, objective: str = "sft"
) -> int:
    """Return the bytes that the micro-batches of a step gather on a sharded base."""
    folder = folder / str(context().rank)
    model = adapted(folder, load(folder, base, shard=True), base)
    fused = install(model.model, lambda: label_losses(model.model, **BATCH))
    LayerCheckpointing(model.model, fused.mlps).set(level)
    config = make_config(folder, base, f"train.objective={objective}")
    loss = make_objective(config.train, config.lora, model.model).loss
    model.model.train()
    with CollectiveBytes() as counted:
        for _ in range(num_micro_batches):
            batch = BATCH if objective == "sft" else PAIR
            loss(model.model, batch, chunk_tokens=None, with_aux_loss=False).total.backward()
    return counted.gathered


def summed_bytes(config: RunConfig, num_steps: int) -> tuple[float, int]:
    """Return the bytes of float32 tensors that a step sums over the ranks, and the number of trained parameters."""
    trainer, _ = trainer_of(config)
    trainer.args.max_steps = num_steps
    with CollectiveBytes() as counted:
        trainer.train()
    return counted.summed / num_steps, sum(weight.numel() for weight in trainable_state(trainer.model).values())
