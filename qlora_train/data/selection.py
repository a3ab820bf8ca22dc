"""Which rows of the stores are trained on and which are held out: every choice is a pure function of content and seed."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_train.config.schema import Source
from qlora_train.data.shuffle import mixed
from qlora_train.data.token_store import Rows
from qlora_train.data.tokenize_chunk import is_held_out
from qlora_train.utils.errors import DataError

log = logging.getLogger("qlora_train")

Indices = npt.NDArray[np.int64]


def keyed_order(digests: npt.NDArray[np.uint64], seed: int) -> Indices:
    """Return an order of rows that looks random and depends on what each says and on the seed alone.

    Args:
        digests: uint64 (num_rows, 2).
        seed: another seed gives an unrelated order.
    """
    return np.argsort(mixed(digests[:, 0], seed), kind="stable").astype(np.int64)


def sample(indices: Indices, digests: npt.NDArray[np.uint64], count: int, seed: int) -> Indices:
    """Return `count` of the indices in their order: each as often as it goes into `count`, and a sample for the rest."""
    if not count:
        return indices[:0]
    times, rest = divmod(count, len(indices))
    extra = np.sort(keyed_order(digests, seed)[:rest])
    return np.concatenate([*[indices] * times, indices[extra]])


def groups_of_equals(*columns: npt.NDArray[Any]) -> tuple[Indices, npt.NDArray[np.bool_]]:
    """Return a number for each row that equal rows share, and whether no earlier row has it; each (num_rows,)."""
    order = np.lexsort(columns)  # stable: equal rows stay in their order
    is_new = np.zeros(len(order), np.bool_)
    is_new[:1] = True
    for column in columns:
        is_new[1:] |= column[order[1:]] != column[order[:-1]]
    group, is_first = np.empty(len(order), np.int64), np.empty(len(order), np.bool_)
    group[order], is_first[order] = np.cumsum(is_new) - 1, is_new
    return group, is_first


def first_of_equals(rows: Rows) -> npt.NDArray[np.bool_]:
    """Say of each row whether no earlier one says the same; the pieces of one row are different rows."""
    digests = rows.digests
    return groups_of_equals(digests[:, 0], digests[:, 1], rows.parts)[1]


def num_repeats(rows: Rows) -> int:
    """Return how many of the files' rows say the same as an earlier one; one that is taken twice is no repeat."""
    distinct = Rows(rows.stores, np.unique(rows.indices))
    return int((~first_of_equals(distinct)).sum())


def is_among(rows: Rows, others: Rows) -> npt.NDArray[np.bool_]:
    """Say of each row whether one of the others says the same."""
    both = np.concatenate([rows.digests, others.digests])
    group, _ = groups_of_equals(both[:, 0], both[:, 1])
    present = np.zeros(len(both), np.bool_)
    present[group[len(rows) :]] = True
    return present[group[: len(rows)]]


def split(digests: npt.NDArray[np.uint64], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Say of each row whether it is held out (see `is_held_out`).

    Raises:
        DataError: nothing would be left to train on or to hold out.
    """
    held_out = np.array([is_held_out(digest.tobytes(), share, seed) for digest in digests], np.bool_)
    for name, num_rows in (("to train on", (~held_out).sum()), ("to hold out", held_out.sum())):
        if not num_rows:
            raise DataError(
                f"data.eval: a share of {share:g} of {len(digests)} rows leaves none {name} (rows are chosen by "
                "a hash, equal rows together); change the share, give more rows, or name a file in data.eval"
            )
    return held_out


def amount(source: Source, num_rows: int) -> int:
    """Return how many rows of a source an epoch takes, of the `num_rows` that it has."""
    if not num_rows:
        log.warning("data.train: %s: no row of it is left to train on", source.path)
        return 0
    if source.num_rows is not None:
        return source.num_rows
    return num_rows if source.weight is None else max(1, round(source.weight * num_rows))


def mix(sources: Sequence[Source], rows: Rows, max_rows: int | None, seed: int) -> Rows:
    """Take from each source what its weight or number says, and of all that at most `max_rows`.

    Args:
        sources: `data.train`, one for each store of `rows`.
        rows: what may be trained on.
        max_rows: `data.max_rows`.
        seed: decides which rows a sample holds.
    """
    origins, digests = rows.origins, rows.digests
    own = [origins == number for number in range(len(sources))]
    counts = [amount(source, int(chosen.sum())) for source, chosen in zip(sources, own, strict=True)]
    if max_rows is not None and max_rows < sum(counts):  # every source gives up the same share
        counts = np.diff(np.cumsum([0, *counts]) * max_rows // sum(counts)).tolist()
    taken = [
        sample(rows.indices[chosen], digests[chosen], count, seed + number)
        for number, (chosen, count) in enumerate(zip(own, counts, strict=True))
    ]
    return Rows(rows.stores, np.concatenate(taken))
