"""Run folders and checkpoints: whole, verified, and enough to continue a run bit for bit."""

from qlora_train.runs.fingerprint import begin, changed_settings, check_same_facts, check_same_settings
from qlora_train.runs.fitted_settings import record_fit, with_recorded_fit
from qlora_train.runs.open_run import finished_run, held, open_run
from qlora_train.runs.run_folder import RunFolder
from qlora_train.runs.training_state import load_parameters, load_tree, random_state, reading, restore_random_state, save_tree

__all__ = [
    "RunFolder", "open_run", "finished_run", "held", "begin", "changed_settings", "check_same_settings",
    "check_same_facts", "save_tree", "load_tree", "random_state", "restore_random_state", "load_parameters", "reading",
    "record_fit", "with_recorded_fit",
]  # fmt: skip
