"""A finished run opened again: its settings, its base as it was trained on, and its models ready for inference.

Its data is not needed and not looked for.
"""

import datetime
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import CHAT_TEMPLATE_FILE

from qlora_train.adapters import load_trained
from qlora_train.config import ModelSection, RunConfig, load_config
from qlora_train.config.schema import CHAT_TEMPLATE_NAMES, COMMIT
from qlora_train.export.merging.merged_model import load_merged
from qlora_train.models import BaseSource, load_model, resolve_base
from qlora_train.runs import RunFolder, check_same_metadata, finished_run
from qlora_train.utils.device import free_memory, select_device
from qlora_train.utils.errors import CheckpointError, first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedRun:
    """A run whose training is done. `date` is the day it began, which dated chat templates go on printing."""

    folder: RunFolder
    config: RunConfig
    source: BaseSource
    date: datetime.date

    def models(self, names: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
        """Yield name, model and tokenizer of base, adapter and merged model, as far as asked for, one after the other.

        Base and adapter share the base's weights: the base is to be done with when the adapter is asked for.

        Raises:
            ModelError, ConfigError: base or adapter cannot be loaded.
            CheckpointError: only the merged model is asked for and there is none, or it cannot be loaded.
        """
        names = existing_models(self.folder, names)
        if {"base", "adapter"} & set(names):
            loaded = load_model(self.config.model, self.config.quantization, source=self.source)
            loaded.model.eval()
            if "base" in names:
                yield "base", loaded.model, loaded.tokenizer
            if "adapter" in names:
                yield "adapter", load_trained(loaded, self.folder.adapter), loaded.tokenizer
            del loaded
            free_memory()
        if "merged" in names:
            model, tokenizer = merged_model(self.folder, trust_remote_code=self.config.model.trust_remote_code)
            yield "merged", model.eval(), tokenizer


def open_finished_run(path: Path) -> FinishedRun:
    """Open a run folder whose training has finished.

    Raises:
        CheckpointError: there is no run, it has not finished, or its base has changed since.
        ModelError: its base cannot be had.
    """
    folder = finished_run(path)
    config = finished_config(load_config(folder.config_file), folder)
    source = resolve_base(config.model)
    check_same_metadata(folder, {"base_identity": source.identity()})
    return FinishedRun(folder, config, source, start_date(folder))


def existing_models(folder: RunFolder, names: Sequence[str]) -> tuple[str, ...]:
    """Return the models that are asked for without the merged one where there is none, which is said.

    Raises:
        CheckpointError: none is left.
    """
    if "merged" not in names or folder.has_merged():
        return tuple(names)
    missing = f"there is no merged model; make one with: qlora-train merge {folder.path}"
    if set(names) == {"merged"}:
        raise CheckpointError(f"{folder.path}: {missing}")
    logger.info("merged: %s", missing)
    return tuple(name for name in names if name != "merged")


def merged_model(folder: RunFolder, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return the merged model of a run with its tokenizer.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    try:
        model = load_merged(folder.merged, select_device(), trust_remote_code=trust_remote_code)
        return model, AutoTokenizer.from_pretrained(
            folder.merged, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder.merged}: cannot be loaded: {first_line(error)}; delete it and merge again"
        ) from error


def finished_config(config: RunConfig, folder: RunFolder) -> RunConfig:
    """Return the settings with which a finished run is used: its base's commit, and its own copy of a template file."""
    model = with_pinned_revision(config.model, folder)
    if model.chat_template not in (None, *CHAT_TEMPLATE_NAMES):
        model = model.model_copy(update={"chat_template": str(folder.adapter / CHAT_TEMPLATE_FILE)})
    return config.model_copy(update={"model": model})


def start_date(folder: RunFolder) -> datetime.date:
    """Return the day the run began: chat templates that print the date go on printing that one."""
    recorded: str | None = folder.metadata().get("date")
    return datetime.date.fromisoformat(recorded) if recorded else datetime.date.today()


def with_pinned_revision(model: ModelSection, folder: RunFolder) -> ModelSection:
    """Return the model section at the commit that the run began with: a branch of the Hub moves on, a run does not."""
    identity = str(folder.metadata().get("base_identity", ""))
    return model.model_copy(update={"revision": identity}) if COMMIT.fullmatch(identity) else model
