"""Run folders, locks, metadata and checkpoints: all that an exact resume needs; only `training_state` imports torch."""

from qlora_train.runs.fingerprint import check_same_metadata, check_same_settings, critical_changes, record_metadata
from qlora_train.runs.fitted_settings import apply_fitted_settings, record_fitted_settings
from qlora_train.runs.open_run import finished_run, open_run, run_lock
from qlora_train.runs.run_folder import RunFolder, read_json, write_json

__all__ = [
    "RunFolder", "read_json", "write_json", "open_run", "finished_run", "run_lock", "record_metadata", "critical_changes",
    "check_same_settings", "check_same_metadata", "record_fitted_settings", "apply_fitted_settings",
]  # fmt: skip
