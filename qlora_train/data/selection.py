"""Which rows of the stores are trained on, held out, or stored as text too: pure functions of content and seed."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_train.config.schema import Source
from qlora_train.data.shuffle import shuffle_hash
from qlora_train.data.token_store import Rows
from qlora_train.utils.errors import DataError

log = logging.getLogger("qlora_train")

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def is_held_out(digest: bytes, share: float, seed: int) -> bool:
    """Decide by content and seed whether a row is held out: adding or removing other rows does not move it.

    Args:
        digest: of `Rows.group_digests`.
    """
    if not share:
        return False
    number = int.from_bytes(hashlib.sha256(f"{seed}:".encode() + digest).digest()[:8], "big")
    return number < share * 2**64


@dataclass(frozen=True, slots=True)
class StoredTexts:
    """Which rows store their prompt and answer as text, for generation.

    Attributes:
        everything: all of them (`data.eval`).
        share: of the rows that are held out by `seed`.
        seed: see `is_held_out`.
        num_examples: first rows of each file, which a base model gets as solved examples.
    """

    everything: bool = False
    share: float = 0.0
    seed: int = 0
    num_examples: int = 64

    def include(self, record_number: int, digest: bytes) -> bool:
        """Return whether a row's texts are stored; `digest` is that of `Rows.group_digests`."""
        return self.everything or record_number < self.num_examples or is_held_out(digest, self.share, self.seed)


def content_order(digests: npt.NDArray[np.uint64], seed: int) -> Indices:
    """Shuffle rows by their content, given as uint64 (num_rows, 2), and the seed alone."""
    return np.argsort(shuffle_hash(digests[:, 0], seed), kind="stable").astype(np.int64)


def _sample(indices: Indices, digests: npt.NDArray[np.uint64], count: int, seed: int) -> Indices:
    """Return `count` of the indices in order: each as often as it fits into `count`, and a sample for the rest."""
    if not count:
        return indices[:0]
    times, rest = divmod(count, len(indices))
    extra = np.sort(content_order(digests, seed)[:rest])
    return np.concatenate([*[indices] * times, indices[extra]])


def _group_equal(*columns: npt.NDArray[Any]) -> tuple[Indices, Mask]:
    """Return a group number that equal rows share, and whether a row is the first of its group; each (num_rows,)."""
    order = np.lexsort(columns)  # stable: equal rows stay in order
    is_new = np.zeros(len(order), np.bool_)
    is_new[:1] = True
    for column in columns:
        is_new[1:] |= column[order[1:]] != column[order[:-1]]
    group, is_first = np.empty(len(order), np.int64), np.empty(len(order), np.bool_)
    group[order], is_first[order] = np.cumsum(is_new) - 1, is_new
    return group, is_first


def first_occurrences(rows: Rows) -> Mask:
    """Return for each row whether no earlier one is equal; the parts of a row that was split are different rows."""
    digests = rows.digests
    return _group_equal(digests[:, 0], digests[:, 1], rows.part_indices)[1]


def num_duplicates(rows: Rows) -> int:
    """Return how many rows of the files equal an earlier one; sampling a row twice does not count."""
    distinct = Rows(rows.stores, np.unique(rows.indices))
    return int((~first_occurrences(distinct)).sum())


def is_among(rows: Rows, others: Rows) -> Mask:
    """Return for each row whether one of the others is equal; for each preference, whether one has its prompt."""
    return _are_among(rows.group_digests, others.group_digests)


def contradictory_pairs(pairs: Rows) -> Mask:
    """Return for each preference pair whether another one has the same answers, swapped."""
    return _are_among(pairs.swapped_digests, pairs.digests)


def _are_among(digests: npt.NDArray[np.uint64], others: npt.NDArray[np.uint64]) -> Mask:
    both = np.concatenate([digests, others])
    group, _ = _group_equal(both[:, 0], both[:, 1])
    present = np.zeros(len(both), np.bool_)
    present[group[len(digests) :]] = True
    return present[group[: len(digests)]]


def held_out_mask(digests: npt.NDArray[np.uint64], share: float, seed: int) -> Mask:
    """Return for each row whether it is held out (see `is_held_out`).

    Args:
        digests: of `Rows.group_digests`.

    Raises:
        DataError: no row would be left to train on or to hold out.
    """
    held_out = np.array([is_held_out(digest.tobytes(), share, seed) for digest in digests], np.bool_)
    for name, num_rows in (("to train on", (~held_out).sum()), ("to hold out", held_out.sum())):
        if not num_rows:
            raise DataError(
                f"data.eval: a share of {share:g} of {len(digests)} rows leaves none {name} (rows are chosen by "
                "a hash, equal rows and pairs of one prompt together); change the share, give more rows, or name a file "
                "in data.eval"
            )
    return held_out


def mix(sources: Sequence[Source], rows: Rows, max_rows: int | None, seed: int) -> Rows:
    """Take from each source as many rows as its weight or number says, and at most `max_rows` (`data.max_rows`) of all.

    Args:
        sources: `data.train`, one for each store of `rows`.
        seed: decides the rows of a sample.
    """
    store_indices, digests = rows.store_indices, rows.digests
    own = [store_indices == index for index in range(len(sources))]
    counts = [_num_used(source, int(mask.sum())) for source, mask in zip(sources, own, strict=True)]
    if max_rows is not None and max_rows < sum(counts):  # every source gives up the same share
        counts = np.diff(np.cumsum([0, *counts]) * max_rows // sum(counts)).tolist()
    samples = [
        _sample(rows.indices[mask], digests[mask], count, seed + index)
        for index, (mask, count) in enumerate(zip(own, counts, strict=True))
    ]
    return Rows(rows.stores, np.concatenate(samples))


def _num_used(source: Source, num_rows: int) -> int:
    if not num_rows:
        log.warning("data.train: %s: no row of it is left to train on", source.path)
        return 0
    if source.num_rows is not None:
        return source.num_rows
    return num_rows if source.weight is None else max(1, round(source.weight * num_rows))
