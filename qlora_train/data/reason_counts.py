"""Rows counted by reason, each reason with a few locations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from qlora_train.utils.errors import DataError

MAX_LOCATIONS = 5
"""Locations that are stored for each reason."""
MAX_REASONS = 8
"""Reasons in a message; the rest is counted together."""


class TooManyDroppedError(DataError):
    """More rows than `data.max_dropped` allows cannot be used, or none can."""


def max_dropped_rows(max_dropped: float, num_records: int) -> int:
    """Return the rows that `data.max_dropped` allows to be unusable."""
    return int(max_dropped * num_records + 1e-9)  # 0.29 * 100 is 28.999999999999996


@dataclass(slots=True)
class ReasonCounts:
    """Rows counted by reason, with the first few locations of each."""

    counts: dict[str, int] = field(default_factory=dict)
    locations: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def sum(cls, several: Iterable[Self]) -> Self:
        """Return what several have counted, in their order."""
        total = cls()
        for each in several:
            total.merge(each)
        return total

    def add(self, reason: str, where: str) -> None:
        self._add(reason, 1, [where])

    def merge(self, other: Self) -> None:
        """Add the counts of later rows."""
        for reason, count in other.counts.items():
            self._add(reason, count, other.locations[reason])

    def _add(self, reason: str, count: int, locations: list[str]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        known = self.locations.setdefault(reason, [])
        known.extend(locations[: MAX_LOCATIONS - len(known)])

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def with_file_names(self, files: Sequence[str]) -> Self:
        """Replace the index of a file, with which stored locations begin, by its name."""
        named = {
            reason: [f"{files[int(index)]}:{line}" for index, _, line in (place.partition(":") for place in locations)]
            for reason, locations in self.locations.items()
        }
        return type(self)(self.counts, named)

    def by_frequency(self) -> list[tuple[str, int, list[str]]]:
        """Return each reason with its count and locations, the most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        return [(reason, count, self.locations[reason]) for reason, count in ordered]

    def remedy(self) -> str:
        """Return what to do where too many rows cannot be used."""
        is_too_long = any("data.max_length" in reason for reason in self.counts)
        return f"correct the rows or raise {'data.max_length or ' if is_too_long else ''}data.max_dropped"

    def summary(self) -> str:
        """Return the most frequent reasons in one line, each with its count and a few locations."""
        ordered = self.by_frequency()
        parts = [
            f"{count} x {reason} ({locations_text(where, count)})" for reason, count, where in ordered[:MAX_REASONS]
        ]
        if rest := ordered[MAX_REASONS:]:
            count = sum(count for _, count, _ in rest)
            locations = [location for *_, where in rest for location in where]
            parts.append(f"{count} x other reasons ({locations_text(locations, count)})")
        return "; ".join(parts)

    def to_json(self) -> list[dict[str, Any]]:
        return [{"reason": reason, "count": count, "locations": where} for reason, count, where in self.by_frequency()]


def locations_text(locations: Sequence[str], count: int) -> str:
    """Join the first locations of `count` rows, and how many more there are."""
    first = locations[:MAX_LOCATIONS]
    return ", ".join(first) + (f" and {count - len(first)} more" if count > len(first) else "")
