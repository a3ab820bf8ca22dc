"""Rows that are tokenised during training, for data that no disk cache should hold.

The stream is endless and its order a pure function of the files and the seed: every epoch permutes all chunks of all
files; windows of WINDOW_CHUNKS chunks are tokenised in worker processes, ahead of training, and their rows shuffled
together. A run resumes at a row number counted from the beginning of the stream. How many rows a window has is known only
after tokenising it; a run that stores `counts` resumes without tokenising earlier windows.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_train.data.readers import Chunk
from qlora_train.data.reason_counts import ReasonCounts, TooManyDroppedError, max_dropped_rows
from qlora_train.data.shuffle import permutation
from qlora_train.data.token_store import SourceSummary, TokenizedChunk
from qlora_train.data.tokenize_chunk import ChunkTokenizer
from qlora_train.data.types import Example
from qlora_train.data.worker_pool import ordered_map

log = logging.getLogger("qlora_train")

WINDOW_CHUNKS = 16
"""Chunks whose rows are shuffled together."""
MIN_RECORDS = 1000
"""Rows from which on `data.max_dropped` is checked before an epoch is over."""

NumberedChunk = tuple[int, bool, Chunk]
"""Index of its file, whether it is the file's first, and the chunk."""


@dataclass(frozen=True, slots=True)
class StreamedSource:
    """A source that is read during training; `identity` is a hash of everything that decides its tokens."""

    path: str
    format: str
    files: Sequence[str]
    chunks: Sequence[NumberedChunk]
    tokenize: ChunkTokenizer
    identity: str


class RowStream:
    """An endless sequence of training rows.

    Args:
        sources: at least one, with at least one chunk.
        seed: decides the order.
        max_dropped: `data.max_dropped`, checked after every window.

    Attributes:
        counts: of each window tokenised so far: its rows, its records, and its unusable records. May be set to those of
            an earlier run.
        sources: as given.
        fingerprint: a sha256 that changes with the tokens of any row and with the order of all.
    """

    def __init__(self, sources: Sequence[StreamedSource], *, seed: int, num_proc: int, max_dropped: float) -> None:
        self.counts: list[list[int]] = []
        self.sources = sources
        self._summaries = [SourceSummary(format=source.format) for source in sources]
        self._seed, self._num_proc = seed, num_proc
        self._max_dropped = max_dropped
        self._chunks = [(number, chunk) for number, source in enumerate(sources) for chunk in source.chunks]
        self._windows_per_epoch = -(-len(self._chunks) // WINDOW_CHUNKS)
        self._head: list[Example] | None = None
        parts = (*(source.identity for source in sources), str(seed), str(WINDOW_CHUNKS))
        self.fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def head(self) -> list[Example]:
        """Return the rows of the first window, tokenised once."""
        if self._head is None:
            self._head = next(self._windows(0))
        return self._head

    def rows(self, start: int) -> Iterator[Example]:
        """Yield the rows from number `start` on, without end.

        Raises:
            DataError: a chunk is malformed, more rows than `data.max_dropped` are unusable, or all are.
        """
        window, before = 0, 0
        while window < len(self.counts) and before + self.counts[window][0] <= start:
            before += self.counts[window][0]
            window += 1
        skip = start - before
        if window == 0:
            yield from self.head()[skip:]
            skip, window = max(0, skip - len(self.head())), 1
        for rows in self._windows(window):
            yield from rows[skip:]
            skip = max(0, skip - len(rows))

    def summaries(self) -> list[SourceSummary]:
        """Return the counts of the rows that this process tokenised, per source."""
        named = zip(self._summaries, self.sources, strict=True)
        return [summary.with_file_names(source.files) for summary, source in named]

    def _windows(self, first: int) -> Iterator[list[Example]]:
        """Yield the rows of each window from number `first` on, shuffled."""
        windows, ahead = itertools.tee(map(self._window_chunks, itertools.count(first)))
        results = ordered_map(self._tokenize, itertools.chain.from_iterable(ahead), self._num_proc)
        for number, chunks in zip(itertools.count(first), windows, strict=False):
            rows: list[Example] = []
            num_records = num_dropped = 0
            for source, _ in chunks:
                chunk = next(results)
                rows += chunk.examples(self.sources[source].files)
                self._summaries[source].count(chunk)
                num_records, num_dropped = num_records + chunk.num_records, num_dropped + chunk.dropped.total
            self._record(number, [len(rows), num_records, num_dropped])
            yield [rows[i] for i in permutation(len(rows), self._seed, number)]

    def _window_chunks(self, window: int) -> list[tuple[int, NumberedChunk]]:
        epoch, position = divmod(window, self._windows_per_epoch)
        order = permutation(len(self._chunks), self._seed, epoch)
        return [self._chunks[i] for i in order[position * WINDOW_CHUNKS : (position + 1) * WINDOW_CHUNKS]]

    def _tokenize(self, item: tuple[int, NumberedChunk]) -> TokenizedChunk:
        source, chunk = item
        return self.sources[source].tokenize(chunk)

    def _record(self, window: int, count: list[int]) -> None:
        """Store the counts of a window, and check `data.max_dropped` for all windows so far."""
        if window == len(self.counts):
            self.counts.append(count)
        assert self.counts[window] == count, "a window gives the same rows whenever it is read"
        _, num_records, num_dropped = map(sum, zip(*self.counts, strict=True))
        is_enough = num_records >= MIN_RECORDS or len(self.counts) >= self._windows_per_epoch
        num_allowed = max_dropped_rows(self._max_dropped, num_records)
        if (is_enough and num_dropped > num_allowed) or num_dropped == num_records:
            dropped = ReasonCounts.sum(summary.dropped for summary in self.summaries())
            raise TooManyDroppedError(
                f"data.train: {num_dropped} of the first {num_records} rows of the stream cannot be used, data.max_dropped "
                f"({self._max_dropped:g}) allows {num_allowed}: {dropped.summary()}; {dropped.remedy()}"
            )
