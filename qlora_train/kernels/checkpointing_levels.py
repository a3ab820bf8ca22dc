"""Levels of activation checkpointing and the choice of one per layer, without torch, as the planner reads it too."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

CheckpointingLevel = Literal["none", "mlp", "full"]
"""Activation checkpointing of a layer: none, the inside of its MLP, or the whole layer."""
LEVELS: tuple[CheckpointingLevel, ...] = ("none", "mlp", "full")
"""From most memory to least."""


def plan_levels(
    saved: Mapping[CheckpointingLevel, Sequence[int]],
    cost: Callable[[int, CheckpointingLevel], float],
    budget_bytes: float,
) -> list[CheckpointingLevel]:
    """Return the level of each layer that recomputes least within a memory budget.

    Greedy in two orders: `none` for as many layers as fit, then `mlp`; or the reverse. Last layers come first: the backward
    pass frees their memory first.

    Args:
        saved: bytes of each layer, by level.
        cost: recomputed work of (layer index, level).
        budget_bytes: for all layers, beyond what they save at `full`.
    """
    plans = [_fill_budget(saved, order, budget_bytes) for order in (("none", "mlp"), ("mlp", "none"))]
    return min(plans, key=lambda levels: sum(cost(index, level) for index, level in enumerate(levels)))


def _fill_budget(
    saved: Mapping[CheckpointingLevel, Sequence[int]], order: Sequence[CheckpointingLevel], budget_bytes: float
) -> list[CheckpointingLevel]:
    levels: list[CheckpointingLevel] = ["full"] * len(saved["full"])
    for level in filter(saved.__contains__, order):
        for index in reversed(range(len(levels))):
            more = saved[level][index] - saved[levels[index]][index]
            if LEVELS.index(level) < LEVELS.index(levels[index]) and more <= budget_bytes:
                levels[index] = level
                budget_bytes -= more
    return levels
