"""Packing: short rows are laid end to end into packs of at most `data.max_length` tokens, so that nothing is padded.

How rows are put together is decided by best-fit decreasing: the longest first, each into the fullest pack that still has
room for it (Johnson et al. 1974, https://doi.org/10.1137/0203025). That depends on the lengths alone, so it is computed
once; every epoch then deals the rows of each length out to that length's places anew, and shuffles the packs. So every
epoch has as many packs, and a row has other neighbours in each; only where hardly another row has its length do they stay.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qlora_train.data.shuffle import permutation


@dataclass(frozen=True, slots=True)
class PackGroup:
    """`count` packs that hold the same: (length, number of rows), longest first."""

    count: int
    content: tuple[tuple[int, int], ...] = ()


def best_fit_decreasing(lengths: npt.NDArray[np.int32], capacity: int) -> list[PackGroup]:
    """Return the packs that rows of these lengths fill.

    Rows of one length are placed together, into all packs of equal content at once: 5 million rows have a few thousand
    lengths.

    Args:
        lengths: tokens of each row, (num_rows,), at least 1 and at most `capacity`.
        capacity: tokens of a pack.
    """
    open_packs = _OpenPacks(capacity)
    counts = np.bincount(lengths)
    assert len(counts) <= capacity + 1, "a row has at most as many tokens as a pack"
    for length in np.flatnonzero(counts)[::-1].tolist():
        open_packs.place(length, int(counts[length]))
    return open_packs.groups()


class _OpenPacks:
    """Packs by the room that is left in them; rows come in descending length."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._by_room: dict[int, list[PackGroup]] = {}
        self._rooms: list[int] = []  # the keys of `_by_room`, ascending

    def groups(self) -> list[PackGroup]:
        """Return all packs, the fullest first."""
        return [group for room in self._rooms for group in self._by_room[room]]

    def place(self, length: int, count: int) -> None:
        """Put `count` rows of one length, one after the other, into the fullest pack that has room.

        A pack that has taken a row is the fullest from then on, until it has no room for another of this length.
        """
        while count and (place := bisect_left(self._rooms, length)) < len(self._rooms):
            count = self._fill(*self._take(place), length, count)
        if count:
            num_new = -(-count // (self._capacity // length))
            self._fill(self._capacity, PackGroup(num_new), length, count)

    def _fill(self, room: int, group: PackGroup, length: int, count: int) -> int:
        """Fill packs with rows of one length, and return how many rows are left."""
        each = room // length
        num_filled = min(group.count, count // each)
        self._put(room - each * length, PackGroup(num_filled, (*group.content, (length, each))))
        count, num_left = count - num_filled * each, group.count - num_filled
        if count and num_left:
            self._put(room - count * length, PackGroup(1, (*group.content, (length, count))))
            count, num_left = 0, num_left - 1
        self._put(room, PackGroup(num_left, group.content))
        return count

    def _take(self, place: int) -> tuple[int, PackGroup]:
        room = self._rooms[place]
        group = self._by_room[room].pop()
        if not self._by_room[room]:
            del self._by_room[room], self._rooms[place]
        return room, group

    def _put(self, room: int, group: PackGroup) -> None:
        if not group.count:
            return
        if room not in self._by_room:
            insort(self._rooms, room)
            self._by_room[room] = []
        self._by_room[room].append(group)


def _packs_of_places(groups: Sequence[PackGroup], num_rows: int) -> npt.NDArray[np.int32]:
    """Return which pack each place for a row is in, int32 (num_rows,), the places in ascending order of their length."""
    lengths, packs = np.empty(num_rows, np.int32), np.empty(num_rows, np.int32)
    place = first_pack = 0
    for group in groups:
        numbers = np.arange(first_pack, first_pack + group.count, dtype=np.int32)
        for length, each in group.content:
            end = place + group.count * each
            lengths[place:end], packs[place:end] = length, np.repeat(numbers, each)
            place = end
        first_pack += group.count
    assert place == num_rows, "every row has a place"
    return packs[np.argsort(lengths, kind="stable")]


class PackOrder:
    """Micro-batches of `batch_size` packs; the last of an epoch may have fewer.

    Args:
        lengths: tokens of each row, (num_rows,).
        max_length: tokens of a pack.
        seed: `run.seed`.
        batch_size: packs of a micro-batch.

    Attributes:
        num_packs: of an epoch.
        efficiency: share of the packs' tokens that rows fill.
    """

    def __init__(self, lengths: npt.NDArray[np.int32], *, max_length: int, seed: int, batch_size: int) -> None:
        self._lengths, self._seed, self._batch_size = lengths, seed, batch_size
        groups = best_fit_decreasing(lengths, max_length)
        self._packs = _packs_of_places(groups, len(lengths))
        self.num_packs = sum(group.count for group in groups)
        self.efficiency = int(lengths.sum(dtype=np.int64)) / (self.num_packs * max_length)

    def __len__(self) -> int:
        return math.ceil(self.num_packs / self._batch_size)

    def epoch_batches(self, epoch: int) -> Iterator[list[int]]:
        """Yield the rows of each micro-batch of an epoch, pack by pack."""
        rows, starts = self.packs(epoch)
        for first in range(0, self.num_packs, self._batch_size):
            last = min(first + self._batch_size, self.num_packs)
            yield rows[starts[first] : starts[last]].tolist()

    def packs(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the packs of an epoch: a pure function of lengths, seed and epoch.

        Returns:
            Row numbers, int64 (num_rows,), pack by pack; and where each pack begins in them and the last one ends, int64
            (num_packs + 1,).
        """
        shuffled = permutation(len(self._lengths), self._seed, epoch)
        rows = shuffled[np.argsort(self._lengths[shuffled], kind="stable")]  # the row of each place
        position = permutation(self.num_packs, self._seed, epoch, self.num_packs)[self._packs]
        order = np.argsort(position, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(position, minlength=self.num_packs))])
        return rows[order], starts
