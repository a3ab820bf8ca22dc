"""The random states of all ranks in a checkpoint. A run that resumes with another number of processes seeds them anew."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_train.parallel import context
from qlora_train.runs.training_state import load_tree, restore_random_state, save_tree


def save_random_states(folder: Path, states: Sequence[dict[str, Any]]) -> None:
    """Write the random state of each rank."""
    for rank, state in enumerate(states):
        save_tree(folder, _name(rank), state)


def restore_rank_random_state(folder: Path, *, seed: int, step: int) -> None:
    """Restore this rank's random state; seed it if the checkpoint is that of another number of processes."""
    world_size = context().world_size
    if (folder / f"{_name(world_size - 1)}.json").is_file() and not (folder / f"{_name(world_size)}.json").exists():
        restore_random_state(load_tree(folder, _name(context().rank)))
    else:
        seed_rank(seed, step)


def seed_rank(seed: int, step: int) -> None:
    """Seed Python, NumPy and torch by (seed, step, rank)."""
    for_python, for_numpy, for_torch = np.random.SeedSequence([seed, step, context().rank]).generate_state(3).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.manual_seed(for_torch)


def _name(rank: int) -> str:
    return "random" if rank == 0 else f"random-{rank}"
