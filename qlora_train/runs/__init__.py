"""Run folders and checkpoints: whole, verified, and enough to continue a run bit for bit."""

from qlora_train.runs.fingerprint import record_metadata, changed_settings, check_same_metadata, check_same_settings
from qlora_train.runs.fitted_settings import record_fitted_settings, apply_fitted_settings
from qlora_train.runs.open_run import finished_run, run_lock, open_run
from qlora_train.runs.run_folder import RunFolder
from qlora_train.runs.training_state import load_parameters, load_tree, random_state, checkpoint_errors, restore_random_state, save_tree

__all__ = [
    "RunFolder", "open_run", "finished_run", "run_lock", "record_metadata", "changed_settings", "check_same_settings",
    "check_same_metadata", "save_tree", "load_tree", "random_state", "restore_random_state", "load_parameters", "checkpoint_errors",
    "record_fitted_settings", "apply_fitted_settings",
]  # fmt: skip
