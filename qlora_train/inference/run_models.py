"""Load the models of a finished run for inference: base, adapter and merged model."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer

from qlora_train.adapters import load_trained
from qlora_train.export.finished_run import FinishedRun
from qlora_train.export.merging.load_merged import load_merged
from qlora_train.models import load_model
from qlora_train.runs import RunFolder
from qlora_train.utils.device import free_memory, select_device
from qlora_train.utils.errors import CheckpointError, first_line

logger = logging.getLogger(__name__)


def run_models(run: FinishedRun, names: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, model and tokenizer of base, adapter and merged model, one at a time.

    Base and adapter share weights: the caller must be done with the base when it asks for the adapter.

    Raises:
        ModelError, ConfigError: base or adapter cannot be loaded.
        CheckpointError: only the merged model is requested and does not exist, or it cannot be loaded.
    """
    names = existing_models(run.folder, names)
    if {"base", "adapter"} & set(names):
        loaded = load_model(run.config.model, run.config.quantization, source=run.source)
        loaded.model.eval()
        if "base" in names:
            yield "base", loaded.model, loaded.tokenizer
        if "adapter" in names:
            yield "adapter", load_trained(loaded, run.folder.adapter), loaded.tokenizer
        del loaded
        free_memory()
    if "merged" in names:
        yield "merged", *merged_model(run.folder, trust_remote_code=run.config.model.trust_remote_code)


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
