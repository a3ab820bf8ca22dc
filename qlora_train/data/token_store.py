"""Tokenised rows on disk, read through memory maps: a run holds 48 bytes per row in memory, however large its data.

A store holds the tokenised rows of one source, in the order of its files:

- ``tokens.bin``    the token ids of all rows, concatenated; 2 bytes each if the vocabulary allows it
- ``mask.bin``      one byte per token: 1 for a label
- ``rows.bin``      one `ROW` per row
- ``metadata.bin``  one line of JSON per row: the index of its file, its location in it, its prompt and answer if they are
  stored, its warnings
- ``summary.json``  `SourceSummary`

Its folder is written once, atomically, and never changed.
"""

import hashlib
import itertools
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Self, overload

import numpy as np
import numpy.typing as npt

from qlora_train.data.reason_counts import ReasonCounts
from qlora_train.data.types import Example
from qlora_train.utils.errors import DataError, first_line

TOKENS, MASK, ROWS, METADATA, SUMMARY = "tokens.bin", "mask.bin", "rows.bin", "metadata.bin", "summary.json"
ROW = np.dtype(
    [
        ("offset", "<i8"),  # of its first token
        ("length", "<i4"),  # tokens
        ("num_labels", "<i4"),
        ("digest", "<u8", (2,)),  # hash of the row's content
        ("part", "<i4"),  # index among the parts of a row that was split
        ("metadata", "<i8"),  # offset of its line
    ],
    align=True,
)
MAX_SYSTEM_PROMPTS = 16
"""System prompts that are counted: enough to find one that most rows share."""


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """Return the smallest type that holds every token id."""
    return np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.int32)


@dataclass(slots=True)
class TokenizedChunk:
    """The rows of one chunk in the layout of a store; offsets count from the chunk's beginning."""

    file_number: int
    tokens: bytes
    mask: bytes
    rows: npt.NDArray[np.void]
    metadata: bytes
    num_records: int
    num_bytes: int
    dropped: ReasonCounts
    warned: ReasonCounts
    unseen: frozenset[str]  # renamed columns that no record of the chunk had
    systems: Counter[str]  # conversations by system prompt, the empty one for none

    def examples(self, files: Sequence[str], dtype: np.dtype[Any]) -> list[Example]:
        """Return the rows; `files` are the names of the source's files, `dtype` is that of the tokens."""
        tokens, mask = np.frombuffer(self.tokens, dtype), np.frombuffer(self.mask, np.bool_)
        metadata = np.frombuffer(self.metadata, np.uint8)
        return [example_at(index, self.rows, tokens, mask, metadata, files) for index in range(len(self.rows))]


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
    token_type: str = "int32"
    content_sha256: str = ""  # of all tokens and masks, in order

    def count(self, chunk: TokenizedChunk) -> None:
        """Add the next chunk."""
        self.num_records += chunk.num_records
        self.num_rows += len(chunk.rows)
        self.num_tokens += len(chunk.mask)
        self.num_labels += int(chunk.rows["num_labels"].sum())
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
        """Read the JSON of its `asdict`."""
        values = json.loads(text)
        counts = {name: ReasonCounts(**values[name]) for name in ("dropped", "warned")}
        return cls(**{**values, **counts})


class StoreWriter:
    """Appends chunks to a new store in an empty folder."""

    def __init__(self, folder: Path, format_name: str, dtype: np.dtype[Any]) -> None:
        self.summary = SourceSummary(format=format_name, token_type=dtype.name)
        self._folder = folder
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in (TOKENS, MASK, ROWS, METADATA)}
        self._digest = hashlib.sha256()

    def append(self, chunk: TokenizedChunk) -> None:
        """Add the rows of the next chunk."""
        summary, rows = self.summary, chunk.rows
        rows["offset"] += summary.num_tokens
        rows["metadata"] += self._files[METADATA].tell()
        contents = {TOKENS: chunk.tokens, MASK: chunk.mask, ROWS: rows.tobytes(), METADATA: chunk.metadata}
        for name, content in contents.items():
            self._files[name].write(content)
        for content in (rows["length"].tobytes(), chunk.tokens, chunk.mask):
            self._digest.update(content)
        summary.count(chunk)

    def close(self) -> None:
        """Write the summary and close the files."""
        for file in self._files.values():
            file.close()
        self.summary.content_sha256 = self._digest.hexdigest()
        (self._folder / SUMMARY).write_text(json.dumps(asdict(self.summary), indent=2) + "\n", encoding="utf-8")


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
            self.summary = SourceSummary.from_json((folder / SUMMARY).read_text(encoding="utf-8")).with_file_names(
                files
            )
            self.rows = _mapped(folder / ROWS, ROW)
            self._tokens = _mapped(folder / TOKENS, np.dtype(self.summary.token_type))
            self._mask = _mapped(folder / MASK, np.dtype(np.bool_))
            self._metadata = _mapped(folder / METADATA, np.dtype(np.uint8))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _malformed(folder, first_line(error)) from None
        sizes = len(self.rows), len(self._tokens), len(self._mask)
        expected = self.summary.num_rows, self.summary.num_tokens, self.summary.num_tokens
        if sizes != expected:
            raise _malformed(folder, f"rows, tokens and mask have {sizes} entries instead of {expected}")

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Example:
        """Return one row, its tokens copied from the map."""
        return example_at(index, self.rows, self._tokens, self._mask, self._metadata, self.files)


def example_at(
    index: int, rows: npt.NDArray[np.void], tokens: npt.NDArray[Any], mask: npt.NDArray[np.bool_],
    metadata: npt.NDArray[np.uint8], files: Sequence[str],
) -> Example:  # fmt: skip
    """Return one row of a store or chunk from its arrays; tokens and mask are copies."""
    (begin, length, *_, line), *following = rows[index : index + 2].tolist()
    end, line_end = begin + length, following[0][-1] if following else len(metadata)
    try:
        file, location, prompt, answer, *warnings = json.loads(metadata[line:line_end].tobytes().decode())
    except ValueError as error:
        raise DataError(
            f"tokenised data cannot be read: malformed {METADATA} ({first_line(error)}); delete the store in data.cache_dir"
        ) from None
    return Example(
        where=f"{files[file]}{location}",
        input_ids=tokens[begin:end].astype(np.int32),
        loss_mask=np.array(mask[begin:end]),
        prompt=tuple(prompt) if isinstance(prompt, list) else prompt,
        answer=answer,
        warnings=tuple(warnings),
    )


def _malformed(folder: Path, reason: str) -> DataError:
    return DataError(f"{folder}: not a store of tokenised data ({reason}); delete that folder")


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # faster to index than np.memmap


class Rows(Sequence[Example]):
    """A selection of the rows of several stores, each made into an `Example` on access.

    Args:
        stores: in the order of their sources.
        indices: positions in the concatenated stores; a row may occur several times.

    Attributes:
        lengths: tokens of each row, int32 (num_rows,).
        num_labels: label tokens of each row, int32 (num_rows,).
    """

    def __init__(self, stores: Sequence[Store], indices: npt.NDArray[np.int64]) -> None:
        self.stores = stores
        self.indices = indices
        self._starts = list(itertools.accumulate((len(store) for store in stores), initial=0))
        self.lengths = self._gather("length")
        self.num_labels = self._gather("num_labels")

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
        return self.stores[source].example(position - self._starts[source])

    def select(self, mask: npt.NDArray[np.bool_]) -> Self:
        """Return the rows for which `mask`, (num_rows,), is true."""
        return type(self)(self.stores, self.indices[mask])

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """Hashes of the rows' content, uint64 (num_rows, 2)."""
        return self._gather("digest")

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
            return np.empty((0, *ROW[name].shape), ROW[name].base)
        whole = [np.asarray(store.rows[name]) for store in self.stores]
        return np.ascontiguousarray((whole[0] if len(whole) == 1 else np.concatenate(whole))[self.indices])
