"""A finished run: its folder, settings, and its base at the commit that it was trained on; no training data is needed."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from transformers.utils import CHAT_TEMPLATE_FILE

from qlora_train.config import ModelSection, RunConfig, load_config
from qlora_train.config.schema import CHAT_TEMPLATE_NAMES
from qlora_train.models import BaseSource, resolve_base
from qlora_train.runs import RunFolder, check_same_metadata, check_same_settings, finished_run


@dataclass(frozen=True)
class FinishedRun:
    """A run whose training is done. Chat templates that print the date print `date`, the day it began."""

    folder: RunFolder
    config: RunConfig
    source: BaseSource
    date: datetime.date

    @classmethod
    def of(cls, folder: RunFolder, config: RunConfig, source: BaseSource) -> Self:
        """Return a finished run with the settings that load its base again."""
        config = config.model_copy(update={"model": _as_trained(folder, config.model)})
        return cls(folder, config, source, folder.start_date())


def open_finished_run(path: Path, overrides: Sequence[str] = ()) -> FinishedRun:
    """Open a run folder whose training has finished; overrides must not affect training.

    Raises:
        CheckpointError: no run, an unfinished one, or one whose base has changed.
        ModelError: the base is not available.
    """
    folder = finished_run(path)
    config = load_config(folder.config_file, overrides)
    check_same_settings(folder, config)
    return reopen(folder, config)


def reopen(folder: RunFolder, config: RunConfig, *, weights: bool = True) -> FinishedRun:
    """Return a finished run with these settings; its base must be the one that it was trained on.

    Raises:
        CheckpointError: the base has changed.
        ModelError: the base is not available.
    """
    source = resolve_base(_as_trained(folder, config.model), weights=weights)
    check_same_metadata(folder, {"base_identity": source.identity()})
    return FinishedRun.of(folder, config, source)


def _as_trained(folder: RunFolder, model: ModelSection) -> ModelSection:
    model = folder.with_pinned_revision(model)
    if model.chat_template in (None, *CHAT_TEMPLATE_NAMES):
        return model
    # a file, of which the run has a copy
    return model.model_copy(update={"chat_template": str(folder.adapter / CHAT_TEMPLATE_FILE)})
