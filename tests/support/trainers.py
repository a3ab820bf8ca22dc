"""Trainers on pico models, as a run makes them."""

import datetime
from pathlib import Path

from qlora_train.adapters import AdaptedModel, attach_adapter
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.evaluation.objective_table import make_objective
from qlora_train.models import load_model, resolve_base
from qlora_train.planning.base_and_data import prepare_tokenizer_and_data
from qlora_train.runs import RunFolder
from qlora_train.training.qlora_trainer import QloraTrainer

DATE = datetime.date(2026, 1, 1)


def trainer_of(config: RunConfig) -> tuple[QloraTrainer, PreparedData]:
    adapted, data = adapted_and_data(config)
    objective = make_objective(config.train, config.lora, adapted.model)
    return QloraTrainer(adapted, data, config, folder_of(config), [], objective=objective), data


def adapted_and_data(config: RunConfig) -> tuple[AdaptedModel, PreparedData]:
    """Return a model with a new adapter, and its rows."""
    source = resolve_base(config.model)
    shard = config.parallel.strategy == "fsdp"
    loaded = load_model(config.model, config.quantization, source=source, shard=shard)
    data, _ = prepare_tokenizer_and_data(config, source, date=DATE)
    return attach_adapter(loaded, config.lora, seed=config.run.seed), data


def folder_of(config: RunConfig) -> RunFolder:
    assert config.run.output_dir is not None
    return RunFolder(Path(config.run.output_dir))
