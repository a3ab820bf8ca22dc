"""The data of a config without its model: what a run begins with, and all that `qlora-train data` needs."""

import datetime
from dataclasses import replace
from typing import Any

from qlora_train.architectures import check_max_length, check_packing, detect
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData, prepare_data
from qlora_train.data.rendered_rows import render_rows
from qlora_train.data.streaming import RowStream
from qlora_train.models import BaseSource, load_tokenizer, resolve_base
from qlora_train.models.loading import model_config
from qlora_train.models.tokenizer import num_embeddings


def inspect(config: RunConfig, *, num_shown: int) -> PreparedData:
    """Prepare the data of a config as a run that begins today would, with its base's tokenizer alone.

    Args:
        config: the resolved config; nothing is written but the cache of tokenised data.
        num_shown: training rows that the report shows as text.

    Raises:
        UserError: the tokenizer or the data cannot be had or used.
    """
    described = resolve_base(config.model, weights=False)
    data, tokenizer = prepare_tokenizer_and_data(config, described, date=datetime.date.today())
    rows = data.train.head() if isinstance(data.train, RowStream) else data.train
    shown = render_rows(rows[:num_shown], tokenizer)
    return replace(data, report=replace(data.report, first_rows=shown))


def prepare_tokenizer_and_data(
    config: RunConfig, described: BaseSource, *, date: datetime.date
) -> tuple[PreparedData, Any]:
    """Prepare the data for a base, and return it with the tokenizer.

    Args:
        config: the resolved config.
        described: the base; its weights need not be there.
        date: the day that dated chat templates are rendered for.

    Raises:
        UserError: the tokenizer or the data cannot be had or used.
    """
    architecture = detect(described.config)
    check_max_length(described.config, architecture, config.data.max_length, config.model.rope_scaling)
    if config.data.packing:
        check_packing(architecture)
    tokenizer = load_tokenizer(described, config.model)
    vocabulary_size = num_embeddings(tokenizer, model_config(described, config.model), config.model)
    data = prepare_data(config.data, tokenizer, config.run.seed, date=date, vocabulary_size=vocabulary_size)
    return data, tokenizer
