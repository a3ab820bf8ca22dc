"""Rows counted by reason, as text and as JSON: the most frequent reason first, a few places of each."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_train.data.types import NUM_LOCATIONS, Example, ReasonCounts

NUM_NAMED_REASONS = 8
"""Reasons that a message gives."""


def merged(tallies: Iterable[ReasonCounts]) -> ReasonCounts:
    """Return what several have counted, in their order."""
    whole = ReasonCounts()
    for tally in tallies:
        whole.merge(tally)
    return whole


def placed(tally: ReasonCounts, files: Sequence[str]) -> ReasonCounts:
    """Return a tally whose places begin with the number of a file, as stores keep them, with the files' names."""
    return ReasonCounts(
        tally.counts,
        {reason: [_placed(place, files) for place in locations] for reason, locations in tally.locations.items()},
    )


def _placed(place: str, files: Sequence[str]) -> str:
    number, mark, rest = place.partition(":")
    return f"{files[int(number)]}{mark}{rest}"


def tally_of(rows: Sequence[Example], chosen: npt.NDArray[np.bool_], reason: str) -> ReasonCounts:
    """Count those rows of which `chosen`, (num_rows,), is true, all for one reason."""
    indices = np.flatnonzero(chosen)
    if not len(indices):
        return ReasonCounts()
    return ReasonCounts({reason: len(indices)}, {reason: [rows[int(index)].where for index in indices[:NUM_LOCATIONS]]})


def by_frequency(tally: ReasonCounts) -> list[tuple[str, int, list[str]]]:
    """Return each reason with its count and places, the most frequent first."""
    ordered = sorted(tally.counts.items(), key=lambda item: -item[1])
    return [(reason, count, tally.locations[reason]) for reason, count in ordered]


def described(tally: ReasonCounts) -> str:
    """Return the most frequent reasons in one line, each with its count and a few places."""
    ordered = by_frequency(tally)
    told = [
        f"{count} x {reason} ({named(locations, count)})" for reason, count, locations in ordered[:NUM_NAMED_REASONS]
    ]
    rest = ordered[NUM_NAMED_REASONS:]
    if rest:
        count = sum(count for _, count, _ in rest)
        told.append(
            f"{count} x other reasons ({named([place for *_, locations in rest for place in locations], count)})"
        )
    return "; ".join(told)


def named(locations: Sequence[str], count: int) -> str:
    """Join the first few places of `count` rows, and say how many more there are."""
    few = locations[:NUM_LOCATIONS]
    more = count - len(few)
    return ", ".join(few) + (f" and {more} more" if more > 0 else "")


def to_json(tally: ReasonCounts) -> list[dict[str, Any]]:
    """Return it as a list of JSON objects, the most frequent reason first."""
    return [
        {"reason": reason, "count": count, "locations": locations} for reason, count, locations in by_frequency(tally)
    ]
