"""Tokenised rows on disk, read through a memory map: a run holds a few bytes per row in memory, however large its data.

A store is a folder that is written once, atomically, and never changed: `rows.arrow` has the tokenised rows of one source,
in the order of its files (`stored_columns`), and `summary.json` a `SourceSummary`.
"""

import hashlib
import itertools
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
import pyarrow

from qlora_train.data.reason_counts import ReasonCounts
from qlora_train.data.stored_columns import (
    DESIRABLE,
    DIGESTS,
    PROMPT_DIGEST,
    PROMPT_LENGTH,
    REJECTED_LABELS,
    REJECTED_LENGTH,
    SWAPPED_DIGEST,
    read_example,
)
from qlora_train.data.types import Example, LogpArray
from qlora_train.utils.errors import DataError, first_line

ROWS, SUMMARY = "rows.arrow", "summary.json"
MIN_BATCH_BYTES = 32 << 20
"""Size of a record batch: an open store holds 36 KB of memory per batch, and finding a row takes time for each."""
MAX_SYSTEM_PROMPTS = 16
"""System prompts that are counted: enough to find one that most rows share."""


@dataclass(slots=True)
class TokenizedChunk:
    """The rows of one chunk of a source, with counts of its records."""

    batch: pyarrow.RecordBatch
    file_number: int = 0
    num_records: int = 0
    num_bytes: int = 0
    dropped: ReasonCounts = field(default_factory=ReasonCounts)
    warned: ReasonCounts = field(default_factory=ReasonCounts)
    unseen: frozenset[str] = frozenset()  # renamed columns that no record of the chunk had
    systems: Counter[str] = field(default_factory=Counter)  # conversations by system prompt, the empty one for none

    def examples(self, files: Sequence[str]) -> list[Example]:
        """Return the rows; `files` are the names of the source's files."""
        return [read_example(self.batch, index, files) for index in range(self.batch.num_rows)]


@dataclass(slots=True)
class SourceSummary:
    """Counts of the rows of one source."""

    format: str = ""
    num_records: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    num_labels: int = 0
    dropped: ReasonCounts = field(default_factory=ReasonCounts)
    warned: ReasonCounts = field(default_factory=ReasonCounts)
    num_conversations: int = 0
    systems: dict[str, int] = field(default_factory=dict)  # the most frequent system prompts
    content_sha256: str = ""  # of all tokens and masks, in order

    def count(self, chunk: TokenizedChunk) -> None:
        self.num_records += chunk.num_records
        self.num_rows += chunk.batch.num_rows
        self.num_tokens += len(chunk.batch.column("tokens").flatten())
        self.num_labels += int(chunk.batch.column("num_labels").to_numpy().sum())
        self.dropped.merge(chunk.dropped)
        self.warned.merge(chunk.warned)
        self.num_conversations += chunk.systems.total()
        self.systems = dict((chunk.systems + Counter(self.systems)).most_common(MAX_SYSTEM_PROMPTS))

    def with_file_names(self, files: Sequence[str]) -> Self:
        """Return it with the files' present names in the locations of rows."""
        dropped, warned = (counts.with_file_names(files) for counts in (self.dropped, self.warned))
        return replace(self, dropped=dropped, warned=warned)

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        counts = {name: ReasonCounts(**values[name]) for name in ("dropped", "warned")}
        return cls(**{**values, **counts})


class StoreWriter:
    """Appends chunks to a new store in an empty folder."""

    def __init__(self, folder: Path, format_name: str, columns: pyarrow.Schema) -> None:
        self.summary = SourceSummary(format=format_name)
        self._folder = folder
        self._batches: list[pyarrow.RecordBatch] = []  # not yet written
        self._num_bytes = 0
        self._file = pyarrow.ipc.new_file(folder / ROWS, columns)
        self._digest = hashlib.sha256()

    def append(self, chunk: TokenizedChunk) -> None:
        """Add the rows of the next chunk."""
        self._batches.append(chunk.batch)
        self._num_bytes += chunk.batch.nbytes
        if self._num_bytes >= MIN_BATCH_BYTES:
            self._write()
        tokens, mask = chunk.batch.column("tokens"), chunk.batch.column("mask")
        of_preferences = [name for name in (REJECTED_LENGTH, DESIRABLE) if name in chunk.batch.schema.names]
        columns = [chunk.batch.column(name) for name in ("length", *of_preferences)]
        for array in (*columns, tokens.flatten(), mask.flatten()):
            self._digest.update(array.to_numpy(zero_copy_only=False).tobytes())
        self.summary.count(chunk)

    def close(self) -> None:
        """Write the summary and close the file."""
        self._write()
        self._file.close()
        self.summary.content_sha256 = self._digest.hexdigest()
        (self._folder / SUMMARY).write_text(json.dumps(asdict(self.summary), indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        if self._batches:
            self._file.write_batch(pyarrow.concat_batches(self._batches))
            self._batches, self._num_bytes = [], 0


class Store:
    """The tokenised rows of one source.

    Args:
        folder: a finished store.
        files: the present names of the source's files, in order: the same content may have moved.

    Raises:
        DataError: the files are not those of one store.
    """

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self.files = files
        try:
            summary = SourceSummary.from_json((folder / SUMMARY).read_text(encoding="utf-8"))
            self.summary = summary.with_file_names(files)
            self._rows = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / ROWS))).read_all()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{folder}: not a store of tokenised data ({first_line(error)}); delete that folder"
            ) from None

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    def example(self, index: int) -> Example:
        """Return one row, its tokens copied from the map."""
        return read_example(self._rows, index, self.files)

    @property
    def has_pairs(self) -> bool:
        """Whether its rows are preference pairs."""
        return REJECTED_LENGTH in self._rows.schema.names

    @property
    def is_unpaired(self) -> bool:
        """Whether its rows are unpaired preferences."""
        return DESIRABLE in self._rows.schema.names

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """Return a column of one number per row, or of two for `DIGESTS`."""
        column = self._rows.column(name)
        if name in DIGESTS:
            column = column.combine_chunks().flatten()
        numbers: npt.NDArray[Any] = column.to_numpy()
        return numbers.reshape(-1, 2) if name in DIGESTS else numbers

    def group_digests(self) -> npt.NDArray[np.uint64]:
        """Return hashes of what is held out together, uint64 (num_rows, 2): of a row, or of the prompt of pairs."""
        return self.numbers(PROMPT_DIGEST if PROMPT_DIGEST in self._rows.schema.names else "digest")


class Rows(Sequence[Example]):
    """A selection of the rows of several stores, each made into an `Example` on access.

    Args:
        stores: in the order of their sources.
        indices: positions in the concatenated stores; a row may occur several times.

    Attributes:
        lengths: tokens of each row, int32 (num_rows,); of a pair, those of both sequences.
        num_labels: label tokens of each row, int32 (num_rows,).
        has_pairs: the rows are preference pairs.
        is_unpaired: the rows are unpaired preferences.
        reference_logps: of each row, (num_rows, num_sequences); None: not computed before training.
    """

    def __init__(
        self, stores: Sequence[Store], indices: npt.NDArray[np.int64], reference_logps: LogpArray | None = None
    ) -> None:
        self.stores = stores
        self.indices = indices
        self.reference_logps = reference_logps
        self._starts = list(itertools.accumulate((len(store) for store in stores), initial=0))
        self.lengths = self._gather("length")
        self.num_labels = self._gather("num_labels")
        self.has_pairs = any(store.has_pairs for store in stores)
        self.is_unpaired = any(store.is_unpaired for store in stores)

    @classmethod
    def all_of(cls, stores: Sequence[Store]) -> Self:
        """Return all rows of the stores, in order."""
        return cls(stores, np.arange(sum(len(store) for store in stores), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = int(self.indices[index])
        source = bisect_right(self._starts, position) - 1
        example = self.stores[source].example(position - self._starts[source])
        return (
            example
            if self.reference_logps is None
            else example.with_reference_logps(self.reference_logps[index].tolist())
        )

    def select(self, mask: npt.NDArray[np.bool_]) -> Self:
        """Return the rows for which `mask`, (num_rows,), is true."""
        logps = None if self.reference_logps is None else self.reference_logps[mask]
        return type(self)(self.stores, self.indices[mask], logps)

    @property
    def max_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each row, of a pair those of its longer sequence, int32 (num_rows,)."""
        if not self.has_pairs:
            return self.lengths
        rejected = self._gather(REJECTED_LENGTH)
        return np.maximum(rejected, self.lengths - rejected)

    @property
    def padded_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each row if the shorter sequence of a pair is padded to the longer, int32 (num_rows,)."""
        return 2 * self.max_lengths if self.has_pairs else self.lengths

    @property
    def max_mismatched_length(self) -> int:
        """Tokens of the longest prompt with the longest answer, of unpaired preferences."""
        prompts = self._gather(PROMPT_LENGTH)
        return int(prompts.max() + (self.lengths - prompts).max())

    @property
    def desirable(self) -> npt.NDArray[np.bool_]:
        """Label of each row, bool (num_rows,), of unpaired preferences."""
        return self._gather(DESIRABLE)

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """Hashes of the rows' content, uint64 (num_rows, 2)."""
        return self._gather("digest")

    @property
    def group_digests(self) -> npt.NDArray[np.uint64]:
        """Hashes of what is held out together, uint64 (num_rows, 2): of a row, or of the prompt of preference pairs."""
        if not self.stores:
            return np.empty((0, 2), np.uint64)
        return np.concatenate([store.group_digests() for store in self.stores])[self.indices]

    @property
    def swapped_digests(self) -> npt.NDArray[np.uint64]:
        """Digests of preference pairs with their answers swapped, uint64 (num_rows, 2)."""
        return self._gather(SWAPPED_DIGEST)

    @property
    def answer_lengths(self) -> npt.NDArray[np.int32]:
        """Label tokens of the chosen and the rejected answer of preference pairs, int32 (num_rows, 2)."""
        rejected = self._gather(REJECTED_LABELS)
        return np.stack([self.num_labels - rejected, rejected], axis=1)

    @property
    def part_indices(self) -> npt.NDArray[np.int32]:
        """Index of each row among the parts of a row that was split, int32 (num_rows,)."""
        return self._gather("part")

    @property
    def store_indices(self) -> npt.NDArray[np.int64]:
        """Index of each row's store, int64 (num_rows,)."""
        return np.searchsorted(self._starts, self.indices, side="right") - 1

    def _gather(self, name: str) -> npt.NDArray[Any]:
        if not self.stores:
            return np.empty((0, 2), np.uint64) if name in DIGESTS else np.empty(0, np.int32)
        return np.concatenate([store.numbers(name) for store in self.stores])[self.indices]
