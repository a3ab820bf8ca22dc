"""Run folders and checkpoints: whole, verified, and enough to continue a run bit for bit."""

from qlora_train.checkpoint.run import RunFolder, check_same_facts, finished_run, open_run
from qlora_train.checkpoint.state import load_parameters, load_tree, random_state, restore_random_state, save_tree

__all__ = [
    "RunFolder", "open_run", "check_same_facts", "finished_run", "save_tree", "load_tree", "random_state",
    "restore_random_state", "load_parameters",
]  # fmt: skip
