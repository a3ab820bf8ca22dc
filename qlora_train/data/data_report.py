"""The report of a run's data: rows read, dropped and used, their tokens and lengths, and findings to look at.

`check_max_dropped` stops a run whose data lost more rows than `data.max_dropped`. `DataReport` describes the data that
passed, for the log, for the terminal, and as JSON.
"""

import logging
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from qlora_train.data.decoded_rows import DecodedRow
from qlora_train.data.formats import FORMATS
from qlora_train.data.label_balance import imbalance
from qlora_train.data.reason_counts import ReasonCounts, TooManyDroppedError, locations_text, max_dropped_rows
from qlora_train.data.split_report import SplitReport
from qlora_train.data.token_store import SourceSummary

log = logging.getLogger("qlora_train")

STREAMED = "data.train: streamed; the counts are those of its beginning"

NUM_FIRST_ROWS = 5
"""Rows that a report shows as text."""
MIN_LABEL_SHARE = 0.01
"""Share of label tokens below which most of the computation trains nothing."""
TRUNCATING = ("truncate", "keep_end", "keep_answer")
"""Values of `data.overflow` under which a row of max_length tokens was probably truncated."""
MAX_SYSTEM_CHARACTERS = 60
"""Characters of a system prompt in a log line."""
MIN_SYSTEM_SHARE = 0.9
"""Share of the conversations from which on their system prompt is the run's: inference uses it too."""


def check_max_dropped(key: str, summaries: Iterable[SourceSummary], max_dropped: float) -> None:
    """Refuse the sources of `key`, ``data.train`` or ``data.eval``, if too few of their rows are left.

    Raises:
        TooManyDroppedError: more rows than `data.max_dropped` are unusable, or all are; the message counts the reasons,
            the most frequent first, with a few locations of each.
    """
    summaries = list(summaries)
    dropped = ReasonCounts.sum(summary.dropped for summary in summaries)
    num_records = sum(summary.num_records for summary in summaries)
    num_allowed = max_dropped_rows(max_dropped, num_records)
    if dropped.total > num_allowed:
        raise TooManyDroppedError(
            f"{key}: {dropped.total} of {num_records} rows cannot be used, data.max_dropped ({max_dropped:g}) allows "
            f"{num_allowed}: {dropped.summary()}; {dropped.remedy()}"
        )
    if summaries and dropped.total == num_records:
        raise TooManyDroppedError(f"{key}: no row can be used: {dropped.summary()}")


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One entry of `data.train` or `data.eval`.

    Attributes:
        key: ``data.train`` or ``data.eval``.
        path: as in the config.
        summary: counts of its rows; one that was split counts as several.
        num_used: its rows in one epoch.
        cached: an earlier run tokenised it.
    """

    key: str
    path: str
    summary: SourceSummary
    num_used: int
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        summary = self.summary
        return {
            "key": self.key, "path": self.path, "format": summary.format, "cached": self.cached,
            "num_records": summary.num_records, "num_rows": summary.num_rows, "num_used": self.num_used,
            "num_dropped": summary.dropped.total, "dropped": summary.dropped.to_json(), "warned": summary.warned.to_json(),
        }  # fmt: skip

    @property
    def _how_split(self) -> str:
        is_pairs = FORMATS[self.summary.format].dataset_type == "preference"
        return "as answers without pairs" if is_pairs else "after splitting"

    def line(self) -> str:
        summary = self.summary
        split = f", {summary.num_rows:,} {self._how_split}" if summary.num_rows > summary.num_records else ""
        used = f", {self.num_used:,} used" if self.num_used != summary.num_rows else ""
        cached = " (cached)" if self.cached else ""
        return (
            f"{self.key}: {self.path}: {summary.num_records:,} rows (format {summary.format}), "
            f"{summary.dropped.total:,} dropped{split}{used}{cached}"
        )


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """The system prompt that `share` of the training conversations have."""

    text: str
    share: float

    @classmethod
    def shared(cls, sources: Iterable[SourceReport]) -> Self | None:
        """Return the system prompt of at least MIN_SYSTEM_SHARE of the conversations, weighted by used rows."""
        counts: defaultdict[str, float] = defaultdict(float)
        num_conversations = 0.0
        for source in sources:
            summary = source.summary
            weight = source.num_used / summary.num_rows if summary.num_rows else 0.0
            num_conversations += weight * summary.num_conversations
            for text, count in summary.systems.items():
                counts[text] += weight * count
        text = max(counts, key=lambda text: counts[text], default="")
        is_shared = bool(text) and counts[text] >= MIN_SYSTEM_SHARE * num_conversations
        return cls(text, counts[text] / num_conversations) if is_shared else None

    def line(self) -> str:
        shown = textwrap.shorten(self.text, MAX_SYSTEM_CHARACTERS, placeholder="...")
        return f"data.train: system prompt of {100 * self.share:.0f} % of conversations, also for inference: {shown!r}"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to look at that does not stop a run: about `num_rows` rows of ``data.train`` or ``data.eval``."""

    key: str
    num_rows: int
    text: str


@dataclass(frozen=True, slots=True)
class DataReport:
    """The report of all data of a run.

    Attributes:
        max_length: `data.max_length`.
        overflow: `data.overflow`.
        sources: in the order of the config.
        splits: by ``data.train`` and, if rows are held out, ``data.eval``.
        first_rows: of `data.train`, as text.
        overlap: rows of `data.eval` that are in `data.train` too.
        is_streamed: only the beginning of `data.train` is known.
        label_weights: of the losses of desirable and undesirable answers.
    """

    max_length: int
    overflow: str
    sources: tuple[SourceReport, ...]
    splits: dict[str, SplitReport]
    first_rows: tuple[DecodedRow, ...]
    overlap: ReasonCounts = field(default_factory=ReasonCounts)
    is_streamed: bool = False
    label_weights: tuple[float, float] = (1.0, 1.0)

    @property
    def system_prompt(self) -> SystemPrompt | None:
        """The system prompt that the conversations of `data.train` share."""
        return SystemPrompt.shared(source for source in self.sources if source.key == "data.train")

    def findings(self) -> list[Finding]:
        """Return what to look at, in the order of the config."""
        keys = dict.fromkeys([*(source.key for source in self.sources), *self.splits])
        return [finding for key in keys for finding in (*self._of_sources(key), *self._of_split(key))]

    def _of_sources(self, key: str) -> Iterator[Finding]:
        summaries = [source.summary for source in self.sources if source.key == key]
        dropped = ReasonCounts.sum(summary.dropped for summary in summaries)
        if dropped.total:
            num_records = sum(summary.num_records for summary in summaries)
            text = f"{dropped.total} of {num_records} rows cannot be used and are dropped: {dropped.summary()}"
            yield Finding(key, dropped.total, text)
        for warning, count, where in ReasonCounts.sum(summary.warned for summary in summaries).by_frequency():
            yield Finding(key, count, f"{count} rows: {warning} ({locations_text(where, count)})")

    def _of_split(self, key: str) -> Iterator[Finding]:
        split = self.splits.get(key)
        if split is None:
            return
        if key == "data.train" and split.num_desirable is not None:
            text = imbalance(split.num_desirable, split.num_rows, *self.label_weights)
            yield from [Finding(key, split.num_rows, text)] if text else []
        if split.label_share < MIN_LABEL_SHARE:
            text = (
                f"only {100 * split.label_share:.2g} % of the tokens are labels; shorten prompts or see data.train_on"
            )
            yield Finding(key, split.num_rows, text)
        if split.pairs is not None:
            yield from (Finding(key, count, text) for count, text in split.pairs.findings())
            if split.num_duplicates:
                text = f"{split.num_duplicates} pairs equal an earlier one; data.deduplicate: true trains once on each"
                yield Finding(key, split.num_duplicates, text)
        if self.overflow in TRUNCATING and split.num_at_max_length > split.num_rows / 2:
            text = (
                f"{split.num_at_max_length} of {split.num_rows} rows have data.max_length ({self.max_length}) tokens, most "
                "of them probably truncated; raise it, or set data.overflow: split"
            )
            yield Finding(key, split.num_at_max_length, text)
        for reason, count, where in self.overlap.by_frequency() if key == "data.eval" else ():
            text = (
                f"{count} of {split.num_rows} rows are {reason}, so the evaluation is biased: "
                f"{locations_text(where, count)}; data.deduplicate: true trains without them"
            )
            yield Finding(key, count, text)

    def lines(self) -> list[str]:
        """Return the report without its findings, a line per source and two per split."""
        sources = [source.line() for source in self.sources]
        streamed = [STREAMED] if self.is_streamed else []
        splits = [line for key, split in self.splits.items() for line in split.lines(key, self.max_length)]
        return [*sources, *streamed, *splits, *([self.system_prompt.line()] if self.system_prompt else [])]

    def log(self) -> None:
        """Log the first line per split as information, the others as detail, and the findings as warnings."""
        heads = [split.lines(key, self.max_length)[0] for key, split in self.splits.items()]
        for line in self.lines():
            log.log(logging.INFO if line in heads or line == STREAMED else logging.DEBUG, "%s", line)
        for finding in self.findings():
            log.warning("%s: %s", finding.key, finding.text)

    def to_json(self) -> dict[str, Any]:
        return {
            "max_length": self.max_length,
            "overflow": self.overflow,
            "is_streamed": self.is_streamed,
            "sources": [source.to_json() for source in self.sources],
            "splits": {key: {**asdict(split), "label_share": split.label_share} for key, split in self.splits.items()},
            "overlap": self.overlap.to_json(),
            "system_prompt": asdict(self.system_prompt) if self.system_prompt else None,
            "findings": [asdict(finding) for finding in self.findings()],
            "first_rows": [row.to_json() for row in self.first_rows],
        }
