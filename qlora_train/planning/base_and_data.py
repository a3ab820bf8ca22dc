"""Resolve the base and prepare the data, without the model: the first stage of a run, and all of `qlora-train data`."""

import datetime
from dataclasses import replace
from typing import Any

from qlora_train.architectures import check_max_length, check_packing, check_target_modules, detect
from qlora_train.config import RunConfig
from qlora_train.config.objectives import dataset_type_of
from qlora_train.data import PreparedData, prepare_data
from qlora_train.data.decoded_rows import decode_rows
from qlora_train.models import BaseSource, load_tokenizer, resolve_base
from qlora_train.models.loading import model_config
from qlora_train.models.tokenizer import check_can_be_saved, num_embeddings
from qlora_train.runs import RunFolder


def prepare(
    config: RunConfig, folder: RunFolder, *, date: datetime.date | None = None
) -> tuple[BaseSource, PreparedData]:
    """Resolve the base and prepare the data; every error in either shows here, before the model is loaded.

    Args:
        date: the day that the run began; None: that of its folder.
    """
    model = folder.with_pinned_revision(config.model)
    source = resolve_base(model, weights=False)
    check_target_modules(detect(source.config), config.lora.target_modules)
    if config.export.merge:
        from qlora_train.export.merging.merge_files import check_mergeable

        check_mergeable(source.config, config)
    data, tokenizer = prepare_tokenizer_and_data(config, source, date=date or folder.start_date())
    check_can_be_saved(
        tokenizer, source.folder, merged=config.export.merge, trust_remote_code=config.model.trust_remote_code
    )
    return (source if source.revision is None else resolve_base(model)), data


def inspect(config: RunConfig, *, num_shown: int) -> PreparedData:
    """Prepare the data as a run that starts today would; the report shows the first `num_shown` training rows as text.

    Raises:
        UserError: tokenizer or data cannot be loaded or used.
    """
    data, tokenizer = prepare_tokenizer_and_data(
        config, resolve_base(config.model, weights=False), date=datetime.date.today()
    )
    return replace(data, report=replace(data.report, first_rows=decode_rows(data.first_rows()[:num_shown], tokenizer)))


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
    data = prepare_data(
        config.data,
        tokenizer,
        config.run.seed,
        date=date,
        vocabulary_size=vocabulary_size,
        dataset_type=dataset_type_of(config.train.objective),
    )
    weights = (config.train.desirable_weight or 1.0, config.train.undesirable_weight or 1.0)
    data = replace(data, report=replace(data.report, label_weights=weights))
    return data, tokenizer
