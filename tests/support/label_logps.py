"""The independent reference of log-probabilities: Transformers' logits, one sequence at a time."""

from typing import Any

import torch
from torch.nn import functional

from qlora_train.data.types import Example


def log_probability(model: Any, sequence: Example) -> float:
    """Return the log-probability of a sequence's labels."""
    return sum(log_probabilities(model, sequence))


@torch.no_grad()
def log_probabilities(model: Any, sequence: Example) -> list[float]:
    """Return the log-probability of each label."""
    ids = torch.from_numpy(sequence.input_ids).long()
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    nll = functional.cross_entropy(logits, ids[1:], reduction="none")
    found: list[float] = (-nll[torch.from_numpy(sequence.loss_mask)[1:]]).tolist()
    return found
