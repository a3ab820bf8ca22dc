"""The balance of desirable and undesirable answers, weighted as their losses are."""

import math
from collections.abc import Callable

MAX_RATIO = 4 / 3
SLACK = 0.01
"""Of the ratio: weights are written with few digits."""


def imbalance(num_desirable: int, num_rows: int, desirable_weight: float, undesirable_weight: float) -> str | None:
    """Return advice on the weights of a data set's labels, or None if they are balanced.

    The weighted numbers of desirable and undesirable rows should have a ratio between 1:1 and 4:3
    (https://arxiv.org/abs/2402.01306, eq. 8).
    """
    num_undesirable = num_rows - num_desirable
    if not num_desirable or not num_undesirable:
        kind, other = ("desirable", "undesirable") if num_desirable else ("undesirable", "desirable")
        return f"all {num_rows} rows are {kind}: nothing is compared; add {other} answers"
    desirable, undesirable = desirable_weight * num_desirable, undesirable_weight * num_undesirable
    if 1 - SLACK <= desirable / undesirable <= MAX_RATIO + SLACK:
        return None
    if desirable > undesirable:
        name, weight = "undesirable_weight", _rounded(desirable / num_undesirable, math.floor)
    else:
        name, weight = "desirable_weight", _rounded(undesirable / num_desirable, math.ceil)
    return (
        f"{num_desirable} rows are desirable and {num_undesirable} undesirable, and their losses weigh "
        f"{desirable:g} to {undesirable:g}; for a ratio between 1:1 and 4:3 set train.{name}: {weight:g}"
    )


def _rounded(value: float, to_whole: Callable[[float], int]) -> float:
    """Round to three digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{to_whole(value / unit) * unit:.6g}")
