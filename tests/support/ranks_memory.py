"""What the tests of memory run on each rank."""

import logging
from typing import Any

import torch
from torch import nn

from qlora_train.config import RunConfig
from qlora_train.models.shard_base import decoder_layers
from qlora_train.parallel import context
from qlora_train.runs import write_json
from qlora_train.training import train
from qlora_train.training.memory.auto_batch_size import record_fallback
from qlora_train.training.row_losses import record_row_losses
from qlora_train.utils.errors import TrainingError, UserError
from tests.support.trainers import adapted_and_data, folder_of, trainer_of

MESSAGE = "CUDA out of memory"


def train_with_too_little_memory(config: RunConfig, max_rows: int) -> str:
    """Train where the second layer of rank 1 has memory for `max_rows` rows, and return how this rank ends."""
    torch.set_num_threads(1)
    adapted, data = adapted_and_data(config)
    folder_of(config).path.mkdir(exist_ok=True)

    def allocate(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if context().rank == 1 and len(arguments[0]) > max_rows:
            raise torch.OutOfMemoryError(MESSAGE)

    decoder_layers(adapted.loaded.model)[1].register_forward_pre_hook(allocate)
    try:
        train(adapted, data, config, folder_of(config), None)
    except (UserError, RuntimeError) as error:
        return str(error)
    return "trained"


def run_out_of_memory_in_turn(config: RunConfig) -> Any:
    """Let rank 1 run out of memory after rank 0 has recorded a smaller token budget; return this rank's error."""
    trainer, _ = trainer_of(config)
    run = folder_of(config)
    if context().is_main:
        write_json(run.padding_free_file, {"min_tokens": 100})
    context().barrier()
    try:
        with record_fallback(trainer, config, run):
            if context().rank == 1:
                context().barrier()
            raise torch.OutOfMemoryError(MESSAGE)
    except TrainingError as error:
        if context().is_main:
            context().barrier()
        return str(error)


def measure_row_losses_with_too_little_memory(config: RunConfig) -> tuple[list[str], int]:
    """Measure row losses where rank 1 has no memory for a row; return this rank's warnings, and a sum over both ranks."""
    trainer, _ = trainer_of(config)
    warnings = Warnings()
    logging.getLogger("qlora_train").addHandler(warnings)

    def allocate(_module: nn.Module, _arguments: tuple[torch.Tensor, ...]) -> None:
        if context().rank == 1:
            raise torch.OutOfMemoryError(MESSAGE)

    decoder_layers(trainer.adapted.loaded.model)[1].register_forward_pre_hook(allocate)
    trainer.state.global_step = 2
    record_row_losses(trainer, 2)
    return warnings.texts, int(context().sum_(torch.ones(3)).sum())


class Warnings(logging.Handler):
    """Collects warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
