"""A finished run: its settings, its base at the commit that it was trained on, and its models for inference.

The training data is not needed.
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
from qlora_train.runs import RunFolder, check_same_metadata, check_same_settings, finished_run
from qlora_train.utils.device import free_memory, select_device
from qlora_train.utils.errors import CheckpointError, first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedRun:
    """A run whose training is done. Chat templates that print the date print `date`, the day it began."""

    folder: RunFolder
    config: RunConfig
    source: BaseSource
    date: datetime.date

    def models(self, names: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
        """Yield name, model and tokenizer of base, adapter and merged model, one at a time.

        Base and adapter share weights: the caller must be done with the base when it asks for the adapter.

        Raises:
            ModelError, ConfigError: base or adapter cannot be loaded.
            CheckpointError: only the merged model is requested and does not exist, or it cannot be loaded.
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
            yield "merged", *merged_model(self.folder, trust_remote_code=self.config.model.trust_remote_code)


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
    model = with_pinned_revision(config.model, folder)
    if model.chat_template not in (None, *CHAT_TEMPLATE_NAMES):  # a file, of which the run has a copy
        model = model.model_copy(update={"chat_template": str(folder.adapter / CHAT_TEMPLATE_FILE)})
    source = resolve_base(model, weights=weights)
    check_same_metadata(folder, {"base_identity": source.identity()})
    return FinishedRun(folder, config.model_copy(update={"model": model}), source, start_date(folder))


def existing_models(folder: RunFolder, names: Sequence[str]) -> tuple[str, ...]:
    """Return the requested models; a merged one that does not exist is left out with a log line.

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


def merged_model(run: RunFolder, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load the merged model of a run, and its tokenizer.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    try:
        model = load_merged(run.merged, select_device(), trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(
            run.merged, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise CheckpointError(
            f"{run.merged}: cannot be loaded: {first_line(error)}; delete it and merge again"
        ) from error
    return model.eval(), tokenizer


def start_date(folder: RunFolder) -> datetime.date:
    """Return the day the run began, which chat templates that print the date keep printing."""
    recorded: str | None = folder.metadata().get("date")
    return datetime.date.fromisoformat(recorded) if recorded else datetime.date.today()


def with_pinned_revision(model: ModelSection, folder: RunFolder) -> ModelSection:
    """Return the model section at the Hub commit that the run began with; branches move."""
    identity = str(folder.metadata().get("base_identity", ""))
    return model.model_copy(update={"revision": identity}) if COMMIT.fullmatch(identity) else model
