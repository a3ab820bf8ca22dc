"""The largest micro-batches of a run, tried before its first step and without a trace: what does not fit shows at once.

Afterwards the run is as if nothing had been: no gradient, no step, every random generator and every buffer as before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from qlora_train.adapters import trainable_state
from qlora_train.config.optimizers import TrainedTensor, optimizer_state_bytes
from qlora_train.data.collate import Batch
from qlora_train.training.parity.gradients import enable_checkpointing
from qlora_train.training.parity.preserve_state import without_trace
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.device import catch_out_of_memory, free_memory


@dataclass(frozen=True)
class Trial:
    """What was tried and whether it fits.

    Attributes:
        tried: the largest batch, for people.
        problem: the message of the out-of-memory error; None where it fits.
        peak_bytes: most of a GPU's memory that torch reserved, fragmentation included; None without one.
    """

    tried: str
    problem: str | None = None
    peak_bytes: int | None = None

    @property
    def memory(self) -> str:
        """The memory it took, where that is known."""
        return "" if self.peak_bytes is None else f", {self.peak_bytes / 1e9:.1f} GB at most"


def try_largest_batch(trainer: QloraTrainer) -> Trial:
    """Run the largest micro-batches forward and backward. Evaluation adapts its batches to memory by itself."""
    device, batches = trainer.adapted.loaded.device, trainer.largest_batches()
    if device.type == "cuda":
        free_memory()  # what start-up reserved and no longer uses
        torch.cuda.reset_peak_memory_stats(device)
    # as the training loop will do, which leaves a model as it is that is prepared already
    model = trainer.accelerator.prepare_model(trainer.model)
    with without_trace(model):
        _, problem = catch_out_of_memory(lambda: _train(trainer, model, batches))
    return Trial(f"training on {_size(batches[0])}", problem, _peak_bytes(device))


def compute_largest_batch(trainer: QloraTrainer) -> None:
    """Run the largest micro-batch forward, as in training, without a trace."""
    batch, *_ = trainer.largest_batches()
    with without_trace(trainer.model):
        trainer.model.train()
        _mean_loss(trainer, trainer.model, batch)


def _train(trainer: QloraTrainer, model: nn.Module, batches: Sequence[Batch]) -> None:
    """Make gradients of each micro-batch beside the memory that the optimizer's state will take."""
    args, device = trainer.args, trainer.adapted.loaded.device
    tensors = [TrainedTensor(tuple(parameter.shape)) for parameter in trainable_state(model).values()]
    optim = str(trainer.args.optim.value)
    paged = optim.startswith("paged") and device.type == "cuda"
    state_bytes = 0 if paged else sum(optimizer_state_bytes(optim, tensor) for tensor in tensors)
    _state = torch.empty(state_bytes, dtype=torch.uint8, device=device)
    if args.gradient_checkpointing:
        enable_checkpointing(trainer.model)
    model.train()
    for batch in batches:
        # the second time beside the gradients of the first
        for _ in range(min(2, trainer.config.train.gradient_accumulation_steps)):
            trainer.accelerator.backward(_mean_loss(trainer, model, batch))
        model.zero_grad(set_to_none=True)


def _mean_loss(trainer: QloraTrainer, model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs = {name: tensor.to(trainer.adapted.loaded.device) for name, tensor in batch.items()}
    with trainer.compute_loss_context_manager():
        return trainer.label_losses(model, inputs).nll.mean()


def _size(batch: Batch) -> str:
    rows, tokens = batch["input_ids"].shape
    num_labels = int(np.count_nonzero(batch["labels"].numpy() != IGNORE_INDEX))
    return f"{rows} x {tokens} tokens with {num_labels} labels"


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
