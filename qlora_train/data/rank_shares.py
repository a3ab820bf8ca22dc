"""Division of an optimizer step's rows over the processes of a run: disjoint, complete and balanced by tokens.

Every rank computes the whole division by itself, from the same lengths, so that nothing is exchanged.
"""

import heapq
from collections.abc import Sequence
from typing import TypeVar

Unit = TypeVar("Unit")


def divide(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return the indices of each rank's units, in ascending order.

    The largest unit left goes to the rank with the fewest tokens: no rank exceeds the mean by more than one unit (Graham
    1969, https://doi.org/10.1137/0117039). With as many units as ranks or more, no rank is left without.

    Args:
        sizes: tokens of each unit, positive.
        num_ranks: processes of the run.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        tokens, rank = loads[0]
        shares[rank].append(index)
        heapq.heapreplace(loads, (tokens + sizes[index], rank))
    return [sorted(share) for share in shares]


def share_of(units: Sequence[Unit], sizes: Sequence[int], rank: int, num_ranks: int) -> list[Unit]:
    """Return the units of a rank, in their order; `sizes` as in `divide`."""
    return [units[index] for index in divide(sizes, num_ranks)[rank]]
