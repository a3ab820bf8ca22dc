"""Packing: short rows are put together into packs of at most `data.max_length` tokens, so that nothing is padded.

Rows are grouped by best-fit decreasing: the longest first, each into the fullest pack that still has room for it (Johnson
et al. 1974, https://doi.org/10.1137/0203025). That depends on the lengths alone, so it is computed once, as slots: a slot
is a length in a pack. Every epoch assigns the rows of each length to that length's slots anew and shuffles the packs. So
every epoch has as many packs, and a row has other neighbours in each, unless hardly another row has its length.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from qlora_train.data.shuffle import permutation


@dataclass(frozen=True, slots=True)
class PackGroup:
    """`count` packs with the same content: (length, number of rows), longest first."""

    count: int
    content: tuple[tuple[int, int], ...] = ()


def best_fit_decreasing(lengths: npt.NDArray[np.int32], max_length: int) -> list[PackGroup]:
    """Return the packs of at most `max_length` tokens for rows of these lengths, (num_rows,).

    Rows of one length go into all packs of equal content at once: 5 million rows have a few thousand lengths.
    """
    open_packs = _OpenPacks(max_length)
    counts = np.bincount(lengths)
    assert len(counts) <= max_length + 1, "a row has at most as many tokens as a pack"
    for length in np.flatnonzero(counts)[::-1].tolist():
        open_packs.add(length, int(counts[length]))
    return open_packs.groups()


class _OpenPacks:
    """Packs by their free tokens; rows come in descending length."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._by_free: dict[int, list[PackGroup]] = {}
        self._free: list[int] = []  # the keys of `_by_free`, ascending

    def groups(self) -> list[PackGroup]:
        """Return all packs, the fullest first."""
        return [group for free in self._free for group in self._by_free[free]]

    def add(self, length: int, count: int) -> None:
        """Put `count` rows of one length, one after the other, into the fullest pack that has room.

        A pack that takes a row is the fullest from then on, until it has no room for another of this length.
        """
        while count and (index := bisect_left(self._free, length)) < len(self._free):
            free = self._free[index]
            group = self._by_free[free].pop()
            if not self._by_free[free]:
                del self._by_free[free], self._free[index]
            count = self._fill(free, group, length, count)
        if count:
            num_new = -(-count // (self._max_length // length))
            self._fill(self._max_length, PackGroup(num_new), length, count)

    def _fill(self, free: int, group: PackGroup, length: int, count: int) -> int:
        """Fill packs with rows of one length, and return how many rows are left."""
        each = free // length
        num_filled = min(group.count, count // each)
        self._put(free - each * length, PackGroup(num_filled, (*group.content, (length, each))))
        count, num_left = count - num_filled * each, group.count - num_filled
        if count and num_left:
            self._put(free - count * length, PackGroup(1, (*group.content, (length, count))))
            count, num_left = 0, num_left - 1
        self._put(free, PackGroup(num_left, group.content))
        return count

    def _put(self, free: int, group: PackGroup) -> None:
        if not group.count:
            return
        if free not in self._by_free:
            insort(self._free, free)
            self._by_free[free] = []
        self._by_free[free].append(group)


def _packs_of_slots(groups: Sequence[PackGroup], num_rows: int) -> npt.NDArray[np.int32]:
    """Return the pack of each slot, int32 (num_rows,), the slots in ascending order of length."""
    lengths, packs = np.empty(num_rows, np.int32), np.empty(num_rows, np.int32)
    slot = first_pack = 0
    for group in groups:
        indices = np.arange(first_pack, first_pack + group.count, dtype=np.int32)
        for length, each in group.content:
            end = slot + group.count * each
            lengths[slot:end], packs[slot:end] = length, np.repeat(indices, each)
            slot = end
        first_pack += group.count
    assert slot == num_rows, "every row has a slot"
    return packs[np.argsort(lengths, kind="stable")]


class PackOrder:
    """Packs in random order.

    Args:
        lengths: tokens of each row, (num_rows,).
        max_length: tokens of a pack.

    Attributes:
        num_packs: of an epoch.
        efficiency: share of the packs' tokens that rows fill.
    """

    def __init__(self, lengths: npt.NDArray[np.int32], *, max_length: int, seed: int) -> None:
        self._lengths, self._seed = lengths, seed
        groups = best_fit_decreasing(lengths, max_length)
        self._packs = _packs_of_slots(groups, len(lengths))
        self.num_packs = sum(group.count for group in groups)
        self.efficiency = int(lengths.sum(dtype=np.int64)) / (self.num_packs * max_length)

    def __len__(self) -> int:
        return self.num_packs

    def epoch_units(self, epoch: int) -> Iterator[list[int]]:
        """Yield the row indices of each pack of an epoch."""
        rows, starts = self.packs(epoch)
        for begin, end in pairwise(starts.tolist()):
            yield rows[begin:end].tolist()

    def packs(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the packs of an epoch, a pure function of lengths, seed and epoch.

        Returns:
            Row indices pack by pack, int64 (num_rows,); and where each pack begins in them, and the last one ends, int64
            (num_packs + 1,).
        """
        shuffled = permutation(len(self._lengths), self._seed, epoch)
        rows = shuffled[np.argsort(self._lengths[shuffled], kind="stable")]  # the row of each slot
        position = permutation(self.num_packs, self._seed, epoch, self.num_packs)[self._packs]
        order = np.argsort(position, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(position, minlength=self.num_packs))])
        return rows[order], starts
