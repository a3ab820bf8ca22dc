"""fit.json: the settings that `train.auto_find_batch_size` chose; config.yaml keeps the requested ones.

It is a file of its own because it is written before the run starts and does not change the result of the run.
"""

from typing import Any

from pydantic import ValidationError

from qlora_train.config.memory_fallbacks import KEYS, changed_settings
from qlora_train.config.resume_policy import is_mutable
from qlora_train.config.schema import TrainSection
from qlora_train.runs.run_folder import RunFolder, read_json, write_json
from qlora_train.utils.errors import CheckpointError


def record_fitted_settings(run: RunFolder, requested: TrainSection, fitted: TrainSection, why: str) -> None:
    """Write fit.json: requested and applied settings, with the reason."""
    values = {key: getattr(requested, key) for key in KEYS}
    write_json(
        run.fitted_settings_file, {"requested": values, "applied": changed_settings(requested, fitted), "why": why}
    )


def apply_fitted_settings(run: RunFolder, requested: TrainSection) -> TrainSection:
    """Return the training settings with those of fit.json.

    A critical setting that was requested otherwise discards all of fit.json; a mutable one discards its own entry.

    Raises:
        CheckpointError: fit.json cannot be read.
    """
    entry = read_json(run.fitted_settings_file)
    if not entry:
        return requested
    try:
        recorded: dict[str, Any] = entry["requested"]
        changed = {key for key in KEYS if recorded[key] != getattr(requested, key)}
        if not all(is_mutable(f"train.{key}") for key in changed):
            return requested
        applied = {key: value for key, value in entry["applied"].items() if key not in changed}
        return TrainSection.model_validate({**requested.model_dump(), **applied})
    except (KeyError, TypeError, AttributeError, ValidationError):
        raise CheckpointError(f"{run.fitted_settings_file}: has unexpected content; restore it, or delete it") from None
