"""Prepare a config's data without the model: the first stage of a run, and all of `qlora-train data`."""

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
    """Prepare the data as a run that starts today would; the report shows the first `num_shown` training rows as text.

    Raises:
        UserError: tokenizer or data cannot be loaded or used.
    """
    data, tokenizer = prepare_tokenizer_and_data(
        config, resolve_base(config.model, weights=False), date=datetime.date.today()
    )
    rows = data.train.head() if isinstance(data.train, RowStream) else data.train
    return replace(data, report=replace(data.report, first_rows=render_rows(rows[:num_shown], tokenizer)))


def prepare_tokenizer_and_data(
    config: RunConfig, source: BaseSource, *, date: datetime.date
) -> tuple[PreparedData, Any]:
    """Prepare the data of a config, and return it with the tokenizer; `date` is for chat templates that print it.

    Raises:
        UserError: tokenizer or data cannot be loaded or used.
    """
    architecture = detect(source.config)
    check_max_length(source.config, architecture, config.data.max_length, config.model.rope_scaling)
    if config.data.packing:
        check_packing(architecture)
    tokenizer = load_tokenizer(source, config.model)
    vocabulary_size = num_embeddings(tokenizer, model_config(source, config.model), config.model)
    data = prepare_data(config.data, tokenizer, config.run.seed, date=date, vocabulary_size=vocabulary_size)
    return data, tokenizer
