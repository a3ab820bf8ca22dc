"""Every rank trains the same adapter, with random numbers of its own."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from qlora_train.parallel import context
from qlora_train.runs.random_states import seed_rank
from qlora_train.utils.errors import TrainingError


@torch.no_grad()
def copy_from_main_(weights: Mapping[str, nn.Parameter]) -> None:
    """Replace the weights by those of rank 0: what computes an initialisation may round differently."""
    if context().world_size == 1:
        return
    for name, tensor in context().broadcast({name: weight.cpu() for name, weight in weights.items()}).items():
        weights[name].copy_(tensor)


def check_replicas(step: int, weights: Mapping[str, nn.Parameter]) -> None:
    """Check that all ranks have bitwise equal weights.

    Raises:
        TrainingError: names the ranks that differ from rank 0.
    """
    if context().world_size == 1:
        return
    digest = hashlib.sha256()
    for weight in weights.values():
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    first, *others = context().gather(digest.hexdigest())
    if differing := [str(rank) for rank, other in enumerate(others, start=1) if other != first]:
        raise TrainingError(
            f"step {step}: the adapters of ranks {', '.join(differing)} differ from that of rank 0; it was not saved; "
            "all processes must use the same kind of GPU or CPU and the same library versions"
        )


class SeedEachRank(TrainerCallback):
    """Gives ranks other than 0 random numbers of their own, for dropout."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Seed this rank; a checkpoint's random state is restored later."""
        if not context().is_main:
            seed_rank(self._seed, state.global_step)
