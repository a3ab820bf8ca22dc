"""fit.json: the rung of the ladder that a run trains on, so that it goes on there; config.yaml stays what was asked for.

It has a file of its own, since it is there before a run counts as begun and says nothing of what decides its result.
"""

import json
from typing import Any

from pydantic import ValidationError

from qlora_train.utils import atomic_io
from qlora_train.runs.run_folder import RunFolder
from qlora_train.config.resume_policy import is_mutable
from qlora_train.config.schema import TrainSection
from qlora_train.utils.errors import CheckpointError
from qlora_train.config.memory_fallbacks import KEYS, changed_settings


def record_fitted_settings(run: RunFolder, asked: TrainSection, fitted: TrainSection, why: str) -> None:
    """Record what a run trains with instead of what was asked for, and why."""
    before = {key: getattr(asked, key) for key in KEYS}
    entry = {"asked": before, "applied": changed_settings(asked, fitted), "why": why}
    atomic_io.write_text(run.fitted_settings_file, json.dumps(entry, indent=2) + "\n")


def apply_fitted_settings(run: RunFolder, asked: TrainSection) -> TrainSection:
    """Return the training settings with what was recorded for them.

    What decides a run must be asked for as it was then, or nothing is taken; a free setting that has changed since is left
    as it is now.

    Raises:
        CheckpointError: fit.json cannot be read.
    """
    entry = run.fitted_settings()
    if not entry:
        return asked
    try:
        before: dict[str, Any] = entry["asked"]
        changed = {key for key in KEYS if before[key] != getattr(asked, key)}
        if not all(is_mutable(f"train.{key}") for key in changed):
            return asked
        applied = {key: value for key, value in entry["applied"].items() if key not in changed}
        return TrainSection.model_validate({**asked.model_dump(), **applied})
    except (KeyError, TypeError, AttributeError, ValidationError):
        raise CheckpointError(f"{run.fitted_settings_file}: is not as it was written; restore it, or delete it") from None
