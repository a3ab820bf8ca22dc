"""What became of the data: rows read, left out and used, their tokens and lengths, and what somebody should look at.

`check_limits` is the gate: it stops a run whose data lost more rows than `data.max_dropped`. `DataReport` is what passed
it, for the log, for the terminal, and as JSON.
"""

import logging
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qlora_train.data.reason_counts import by_frequency, described, merged, named, to_json
from qlora_train.data.rendered_rows import RenderedRow
from qlora_train.data.token_store import SourceSummary
from qlora_train.data.types import ReasonCounts
from qlora_train.utils.errors import DataError

log = logging.getLogger("qlora_train")

NUM_FIRST_ROWS = 5
"""Rows that a report shows as text."""
FEW_LABELS = 0.01
"""Share of tokens with loss below which most of the computing teaches nothing."""
CUTTING = ("truncate", "keep_end", "keep_answer")
"""Values of `data.overflow` under which a row of max_length tokens has probably lost some."""
LONGEST_SYSTEM = 60
"""Characters of a system prompt in a line of the log."""
MIN_SYSTEM_SHARE = 0.9
"""Share of the conversations from which on their system prompt is the run's: inference uses it too."""


def check_limits(key: str, dropped: ReasonCounts, num_records: int, max_dropped: float) -> None:
    """Refuse data of which too little is left.

    Args:
        key: ``data.train`` or ``data.eval``.
        dropped: its rows that cannot be used.
        num_records: all of its rows, these included.
        max_dropped: `data.max_dropped`.

    Raises:
        DataError: more rows cannot be used than `max_dropped` allows, or none is left; the message counts the reasons,
            the most frequent first, and names a few rows of each.
    """
    num_allowed = int(max_dropped * num_records + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if dropped.total > num_allowed:
        raise DataError(
            f"{key}: {dropped.total} of {num_records} rows cannot be used, data.max_dropped ({max_dropped:g}) allows "
            f"{num_allowed}: {described(dropped)}; correct the rows or raise data.max_dropped"
        )
    if dropped.total == num_records:
        raise DataError(f"{key}: no row can be used: {described(dropped)}")


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One entry of `data.train` or `data.eval`.

    Attributes:
        key: ``data.train`` or ``data.eval``.
        path: as the config has it.
        format: of its rows.
        cached: it had been tokenised before.
        num_records: rows in its files.
        num_rows: rows made of them; a row that was split counts as several.
        num_taken: rows of the part `key` that come from it, in one epoch.
        dropped: rows that cannot be used, by reason.
        noted: rows with something to know about them, by what it is.
    """

    key: str
    path: str
    format: str
    cached: bool
    num_records: int
    num_rows: int
    num_taken: int
    dropped: ReasonCounts
    warned: ReasonCounts

    @classmethod
    def of(cls, key: str, path: str, summary: SourceSummary, *, num_taken: int, cached: bool) -> Self:
        """Return the report of a source from what its store counted."""
        return cls(
            key, path, summary.format, cached, summary.num_records, summary.num_rows, num_taken, summary.dropped,
            summary.warned,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object, with the reasons as a list, the most frequent first."""
        lists = {"dropped": to_json(self.dropped), "warned": to_json(self.warned)}
        return {**asdict(self), "num_dropped": self.dropped.total, **lists}

    def line(self) -> str:
        """Return it as a line."""
        made = f", {self.num_rows:,} made of them" if self.num_rows != self.num_records else ""
        taken = f", {self.num_taken:,} taken" if self.num_taken != self.num_rows else ""
        cached = " (tokenised before)" if self.cached else ""
        return (
            f"{self.key}: {self.path}: {self.num_records:,} rows of format {self.format}, {self.dropped.total:,} left out"
            f"{made}{taken}{cached}"
        )


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """The system prompt that `share` of the training conversations have."""

    text: str
    share: float

    @classmethod
    def shared(cls, sources: Iterable[tuple[SourceSummary, int]]) -> Self | None:
        """Return the system prompt of at least MIN_SYSTEM_SHARE of the conversations, None where there is none.

        Args:
            sources: each with the number of its rows that are taken, of which all of its prompts have the same part.
        """
        counts: defaultdict[str, float] = defaultdict(float)
        num_conversations = 0.0
        for summary, num_taken in sources:
            weight = num_taken / summary.num_rows if summary.num_rows else 0.0
            num_conversations += weight * summary.num_conversations
            for text, count in summary.systems.items():
                counts[text] += weight * count
        text = max(counts, key=lambda text: counts[text], default="")
        is_shared = bool(text) and counts[text] >= MIN_SYSTEM_SHARE * num_conversations
        return cls(text, counts[text] / num_conversations) if is_shared else None

    def line(self) -> str:
        """Return it for the log."""
        shown = textwrap.shorten(self.text, LONGEST_SYSTEM, placeholder="...")
        return f"system prompt of {100 * self.share:.0f} % of the conversations, used in inference too: {shown!r}"


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long rows are, in tokens: the shortest, the middle one, those that 90 % and 99 % do not exceed, the longest."""

    min: int
    median: int
    p90: int
    p99: int
    max: int

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int32]) -> Self:
        """Return the lengths of at least one row, (num_rows,); each is that of some row."""
        return cls(*map(int, np.quantile(lengths, (0, 0.5, 0.9, 0.99, 1), method="inverted_cdf")))


@dataclass(frozen=True, slots=True)
class PartReport:
    """The rows of `data.train` or of `data.eval` as they are used, in one epoch.

    Attributes:
        num_rows: rows.
        num_tokens: their tokens.
        num_labels: those of them that carry loss.
        lengths: of the rows.
        num_at_max_length: rows of exactly `data.max_length` tokens.
        num_repeats: rows that say the same as an earlier one.
        num_deduplicated: rows that `data.deduplicate` took out.
    """

    num_rows: int
    num_tokens: int
    num_labels: int
    lengths: Lengths
    num_at_max_length: int
    num_repeats: int
    num_deduplicated: int

    @classmethod
    def of(
        cls,
        lengths: npt.NDArray[np.int32],
        num_labels: npt.NDArray[np.int32],
        *,
        max_length: int,
        num_repeats: int,
        num_deduplicated: int = 0,
    ) -> Self:
        """Count at least one row.

        Args:
            lengths: tokens of each row, (num_rows,).
            num_labels: tokens with loss of each row, (num_rows,).
            max_length: `data.max_length`.
            num_repeats: rows that say the same as an earlier one.
            num_deduplicated: rows that `data.deduplicate` took out.
        """
        return cls(
            num_rows=len(lengths),
            num_tokens=int(lengths.sum(dtype=np.int64)),
            num_labels=int(num_labels.sum(dtype=np.int64)),
            lengths=Lengths.of(lengths),
            num_at_max_length=int(np.count_nonzero(lengths == max_length)),
            num_repeats=num_repeats,
            num_deduplicated=num_deduplicated,
        )

    @property
    def label_share(self) -> float:
        """Share of the tokens that carries loss."""
        return self.num_labels / self.num_tokens

    def line(self, key: str, max_length: int) -> str:
        """Return it as a line."""
        removed = f", {self.num_deduplicated} more taken out by data.deduplicate" if self.num_deduplicated else ""
        lengths = self.lengths
        return (
            f"{key}: {self.num_rows} rows ({self.num_repeats} of them repeat an earlier one{removed}), "
            f"{self.num_tokens:,} tokens, {self.num_labels:,} of them with loss ({100 * self.label_share:.1f} %); tokens a "
            f"row: least {lengths.min}, median {lengths.median}, 90 % up to {lengths.p90}, 99 % up to {lengths.p99}, most "
            f"{lengths.max}; rows of data.max_length ({max_length}): {self.num_at_max_length}"
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not stop a run, and that somebody should look at.

    Attributes:
        key: ``data.train`` or ``data.eval``.
        num_rows: rows that it is about.
        text: what was found, with places, and what can be done.
    """

    key: str
    num_rows: int
    text: str


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of all the data of a run.

    Attributes:
        max_length: `data.max_length`.
        overflow: `data.overflow`.
        sources: in the order of the config.
        parts: by ``data.train`` and, where rows are held out, ``data.eval``.
        overlap: rows of `data.eval` that are trained on too.
        first_rows: the first ones of `data.train`, as text.
        system_prompt: what the conversations of `data.train` share.
        is_streamed: of `data.train` only the beginning is known.
    """

    max_length: int
    overflow: str
    sources: tuple[SourceReport, ...]
    parts: dict[str, PartReport]
    overlap: ReasonCounts
    first_rows: tuple[RenderedRow, ...]
    system_prompt: SystemPrompt | None = None
    is_streamed: bool = False

    def findings(self) -> list[Finding]:
        """Return what somebody should look at, in the order of the config."""
        return [finding for key in self._keys() for finding in chain(self._of_sources(key), self._of_part(key))]

    def _keys(self) -> list[str]:
        return list(dict.fromkeys([*(source.key for source in self.sources), *self.parts]))

    def _of_sources(self, key: str) -> Iterator[Finding]:
        sources = [source for source in self.sources if source.key == key]
        dropped = merged(source.dropped for source in sources)
        if dropped.total:
            num_records = sum(source.num_records for source in sources)
            told = f"{dropped.total} of {num_records} rows cannot be used and are left out: {described(dropped)}"
            yield Finding(key, dropped.total, told)
        for note, count, places in by_frequency(merged(source.warned for source in sources)):
            yield Finding(key, count, f"{count} rows: {note} ({named(places, count)})")

    def _of_part(self, key: str) -> Iterator[Finding]:
        part = self.parts.get(key)
        if part is None:
            return
        if part.label_share < FEW_LABELS:
            told = f"only {100 * part.label_share:.2g} % of the tokens carry loss; shorten prompts or see data.train_on"
            yield Finding(key, part.num_rows, told)
        if self.overflow in CUTTING and part.num_at_max_length > part.num_rows / 2:
            told = (
                f"{part.num_at_max_length} of {part.num_rows} rows fill data.max_length ({self.max_length} tokens), most "
                "of them probably cut to it; raise it, or set data.overflow: split"
            )
            yield Finding(key, part.num_at_max_length, told)
        if key == "data.eval" and self.overlap.total:
            places = [place for *_, places in by_frequency(self.overlap) for place in places]
            told = (
                f"{self.overlap.total} of {part.num_rows} rows of data.eval stand in data.train too, so the evaluation "
                f"flatters: {named(places, self.overlap.total)}; data.deduplicate: true trains without them"
            )
            yield Finding(key, self.overlap.total, told)

    def lines(self) -> list[str]:
        """Return what became of the data, a line a source and a part; the findings are not among them."""
        sources = [source.line() for source in self.sources]
        parts = [part.line(key, self.max_length) for key, part in self.parts.items()]
        streamed = ["data.train: streamed; what follows is its beginning"] if self.is_streamed else []
        system = [f"data.train: {self.system_prompt.line()}"] if self.system_prompt else []
        return [*sources, *streamed, *parts, *system]

    def log(self) -> None:
        """Write it to the log: the lines as information, the findings as warnings."""
        for line in self.lines():
            log.info("%s", line)
        for finding in self.findings():
            log.warning("%s: %s", finding.key, finding.text)

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "max_length": self.max_length,
            "overflow": self.overflow,
            "is_streamed": self.is_streamed,
            "sources": [source.to_json() for source in self.sources],
            "parts": {key: {**asdict(part), "label_share": part.label_share} for key, part in self.parts.items()},
            "overlap": to_json(self.overlap),
            "system_prompt": asdict(self.system_prompt) if self.system_prompt else None,
            "findings": [asdict(finding) for finding in self.findings()],
            "first_rows": [row.to_json() for row in self.first_rows],
        }
