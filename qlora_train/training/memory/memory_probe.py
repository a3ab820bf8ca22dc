"""Run the worst-case micro-batches before step 1, so that out of memory shows at once. The model's state is preserved."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from qlora_train.config.optimizers import OPTIMIZERS, optimizer_state_bytes
from qlora_train.data.collate import Batch
from qlora_train.kernels.fsdp_units import is_sharded
from qlora_train.parallel import context
from qlora_train.training.memory.worst_case_batch import worst_case_batches
from qlora_train.training.optimizer import trained_tensors
from qlora_train.training.parity.gradients import enable_full_checkpointing
from qlora_train.training.parity.preserve_state import preserve_model_state
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.device import catch_out_of_memory, free_memory
from qlora_train.utils.memory_meter import reset_gpu_peak


@dataclass(frozen=True)
class MemoryProbe:
    """Result of a probe.

    Attributes:
        batch: description of the largest batch.
        problem: message of the out-of-memory error on some rank; None if the batch fits on all.
        peak_bytes: peak of the GPU memory that torch reserved, fragmentation included; None on a CPU.
    """

    batch: str
    problem: str | None = None
    peak_bytes: int | None = None


def probe_memory(trainer: QloraTrainer) -> MemoryProbe:
    """Run the worst-case micro-batches forward and backward. Evaluation has its own batch size search.

    Raises:
        torch.OutOfMemoryError: the batch does not fit, with a sharded base.
    """
    device, batches = trainer.adapted.loaded.device, worst_case_batches(trainer.batch_source, trainer.config)
    if device.type == "cuda":
        free_memory()  # reserved by start-up and no longer used
        reset_gpu_peak(device)
    # as the training loop does; a prepared model stays as it is
    model = trainer.accelerator.prepare_model(trainer.model)
    with preserve_model_state(model):
        if is_sharded(model):  # other ranks may wait for this one's part of a layer: they cannot agree to retry
            _train(trainer, model, batches)
            problem = None
        else:
            _, problem = catch_out_of_memory(lambda: _train(trainer, model, batches))
    problem = next((text for text in context().gather(problem) if text is not None), None)
    return MemoryProbe(f"training on {_size(batches[0])}", problem, _peak_bytes(device))


def forward_worst_case(trainer: QloraTrainer) -> None:
    """Run the largest micro-batch forward in training mode; the model's state is preserved."""
    batch, *_ = worst_case_batches(trainer.batch_source, trainer.config)
    with preserve_model_state(trainer.model):
        trainer.model.train()
        _mean_loss(trainer, trainer.model, batch)


def _train(trainer: QloraTrainer, model: nn.Module, batches: Sequence[Batch]) -> None:
    """Compute gradients of each micro-batch, with as much memory allocated as the optimizer's state will need."""
    _state = torch.empty(_state_bytes(trainer), dtype=torch.uint8, device=trainer.adapted.loaded.device)
    if trainer.args.gradient_checkpointing:
        enable_full_checkpointing(trainer.model)
    model.train()
    for batch in batches:
        # the second micro-batch runs while the gradients of the first exist
        for _ in range(min(2, trainer.config.train.gradient_accumulation_steps)):
            trainer.accelerator.backward(_mean_loss(trainer, model, batch))
        model.zero_grad(set_to_none=True)


def _state_bytes(trainer: QloraTrainer) -> int:
    """Return the size of the optimizer's state in the device's memory; paged state can leave it."""
    optim, device = str(trainer.args.optim.value), trainer.adapted.loaded.device
    if OPTIMIZERS[optim].paged and device.type == "cuda":
        return 0
    return sum(optimizer_state_bytes(optim, tensor) for tensor in trained_tensors(trainer.adapted))


def _mean_loss(trainer: QloraTrainer, model: nn.Module, batch: Batch) -> torch.Tensor:
    if trainer.objective.kl_sum is not None:
        [batch] = trainer.with_step_kl(model, [batch], trainer.objective.loss.num_items(batch))
    inputs = {name: tensor.to(trainer.adapted.loaded.device) for name, tensor in batch.items()}
    with trainer.compute_loss_context_manager():
        loss = trainer.objective.loss
        return trainer.batch_loss(model, inputs).mean(loss.num_items(batch), loss.num_sft_tokens(batch))


def _size(batch: Batch) -> str:
    rows, tokens = batch["input_ids"].shape
    num_labels = int(np.count_nonzero(batch["labels"].numpy() != IGNORE_INDEX))
    return f"{rows} x {tokens} tokens with {num_labels} labels"


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
