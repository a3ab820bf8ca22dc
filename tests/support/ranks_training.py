"""What the tests of data-parallel training run on each rank, and in one process to compare with."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from qlora_train.adapters import trainable_state
from qlora_train.config import RunConfig
from qlora_train.parallel import context
from tests.support.trainers import trainer_of


@dataclass
class StepRecord:
    """An optimizer step: its loss, the gradient of every trained tensor before clipping, and this rank's rows."""

    loss: float
    gradients: dict[str, Any]
    rows: list[int]


def record_steps(config: RunConfig, num_steps: int, noise: float = 0.0) -> tuple[list[StepRecord], dict[str, Any]]:
    """Train some steps, and return them with the trainer's log history and token count.

    Args:
        noise: added to the adapter before the first step, as a standard deviation.
    """
    trainer, _ = trainer_of(config)
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable_state(trainer.model).values():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    steps: list[StepRecord] = []
    training_step = trainer.training_step

    def recorded(model: Any, inputs: Any, num_items: Any = None) -> torch.Tensor:
        loss = training_step(model, inputs, num_items)
        gradients = {
            name: parameter.grad.numpy().copy()
            for name, parameter in trainable_state(trainer.model).items()
            if parameter.grad is not None
        }
        steps.append(StepRecord(float(loss), gradients, [int(row) for batch in inputs for row in batch["row"]]))
        return loss

    trainer.training_step = recorded  # type: ignore[method-assign]
    trainer.args.max_steps = num_steps
    trainer.train()
    history = {"log": trainer.state.log_history, "tokens": trainer.state.num_input_tokens_seen}
    return steps, history


def record_families(configs: dict[str, RunConfig], num_steps: int, noise: float = 0.0) -> dict[str, Any]:
    """Return `record_steps` of several configs, in one set of processes."""
    torch.set_num_threads(1)
    records = {name: record_steps(config, num_steps, noise) for name, config in configs.items()}
    if context().is_main:
        return records
    return {
        name: ([StepRecord(step.loss, {}, step.rows) for step in steps], history)
        for name, (steps, history) in records.items()
    }


def relative_difference(actual: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest difference of a tensor, relative to its norm; zero gradients must be zero in both."""
    assert actual.keys() == expected.keys()
    differences = [0.0]
    for name, tensor in expected.items():
        norm = float(np.linalg.norm(tensor))
        difference = float(np.linalg.norm(actual[name] - tensor))
        differences.append(difference / norm if norm else difference)
    return max(differences)


def train_in_float16(config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train with a loss scaler, as on a GPU without bfloat16; return the weights and the scaler's state."""
    torch.set_num_threads(1)
    trainer, _ = trainer_of(config)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    try:
        trainer.train()
    finally:
        AcceleratorState._reset_state()
    weights = {name: parameter.detach().numpy() for name, parameter in trainable_state(trainer.model).items()}
    return weights, trainer.accelerator.scaler.state_dict()
