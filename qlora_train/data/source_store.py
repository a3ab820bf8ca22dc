"""A source -> its store, from the cache or made now: files -> chunks -> worker processes -> one folder of tokens."""

import datetime
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_train.config.schema import DataSection, Source
from qlora_train.data.chat_template import is_dated
from qlora_train.data.formats import check_renames, recognise
from qlora_train.data.readers import Chunk, chunks
from qlora_train.data.sources import DataFile, find_files
from qlora_train.data.streaming import StreamedSource
from qlora_train.data.token_cache import StoreCache, key_of
from qlora_train.data.token_store import Store, StoreWriter, token_dtype
from qlora_train.data.tokenize_chunk import ChunkTokenizer, StoredTexts
from qlora_train.data.types import Record
from qlora_train.data.worker_pool import num_processes, ordered_map
from qlora_train.utils.errors import DataError

log = logging.getLogger("qlora_train")

CHUNK_BYTES = 1 << 20
"""Bytes of a file that a worker takes at a time."""
PLAIN_FORMATS = ("text", "tokens")
WORTH_BYTES = 4 << 20
"""Size of a source from which on several processes are quicker than one."""


@dataclass(frozen=True, slots=True)
class SourceStore:
    """A source of the config and its tokenised rows; `cached` when they were there before."""

    source: Source
    store: Store
    cached: bool

    @property
    def is_plain(self) -> bool:
        """Whether no chat template had a part in its tokens."""
        return self.store.summary.format in PLAIN_FORMATS


class StoreMaker:
    """Makes the stores of a run's sources.

    Args:
        data: the section of the config.
        tokenizer: a fast Transformers tokenizer.
        date: the day that dated chat templates print.
        vocabulary_size: token ids that the model has.
    """

    def __init__(self, data: DataSection, tokenizer: Any, date: datetime.date, vocabulary_size: int) -> None:
        self._data, self._tokenizer, self._date, self.vocabulary_size = data, tokenizer, date, vocabulary_size
        self._cache = StoreCache(data.cache_dir, data.cache_limit)
        self._identity = tokenizer_identity(tokenizer)

    def store(self, key: str, source: Source, kept: StoredTexts) -> SourceStore:
        """Return the store of one source.

        Args:
            key: ``data.train`` or ``data.eval``, for messages.
            source: one of its entries.
            kept: rows whose texts are kept.

        Raises:
            ConfigError: column names that the format does not have.
            DataError: the source is missing, malformed or empty, or its columns fit no format, or several.
        """
        files, format_name, columns = self._understood(key, source)
        making = _Making(key, files, format_name, columns, self._data.num_proc)

        def make(folder: Path) -> None:
            making.run(folder, self._tokenizer_of_chunks(format_name, columns, kept), token_dtype(self.vocabulary_size))

        decisive = self._decisive(files, format_name, columns, kept)
        name = key_of([file.path for file in files], decisive)
        store, cached = self._cache.get(name, make, lambda folder: Store(folder, [file.name for file in files]))
        if cached:
            log.info("%s: %s: tokenised before, taken from %s", key, source.path, self._cache.folder / name)
        return SourceStore(source, store, cached)

    def streamed(self, key: str, source: Source) -> StreamedSource:
        """Return a source that is tokenised while it is trained on.

        Raises:
            ConfigError, DataError: as `store` does; and a file whose rows cannot be found without reading what lies before.
        """
        files, format_name, columns = self._understood(key, source)
        pieces = []
        for number, file in enumerate(files):
            _first_record(file)  # refuses a file without rows
            for position, chunk in enumerate(chunks(file, chunk_bytes=CHUNK_BYTES)):
                if chunk.holds_rows:
                    raise DataError(
                        f"{key}: {file.name} cannot be streamed, since its rows are found only by reading it from the "
                        "beginning; expected jsonl, txt, arrow, or parquet with small row groups, without compression"
                    )
                pieces.append((number, position == 0, chunk))
        kept = StoredTexts(everything=True)  # nothing is stored
        identity = key_of(
            [file.path for file in files],
            {**self._decisive(files, format_name, columns, kept), "chunk_bytes": CHUNK_BYTES},
        )
        tokenize = self._tokenizer_of_chunks(format_name, columns, kept)
        return StreamedSource(source.path, format_name, [file.name for file in files], pieces, tokenize, identity)

    def _understood(self, key: str, source: Source) -> tuple[list[DataFile], str, Mapping[str, str]]:
        """Return the files of a source, its format and the names of its columns."""
        files = find_files(source, key)
        columns = self._data.columns if source.columns is None else source.columns
        wanted = source.format or self._data.format
        # names that the config gives for all sources may belong to the format of another one
        check_renames("auto" if source.columns is None and source.format else wanted, columns)
        return files, recognise(_first_record(files[0]), wanted, columns), columns

    def _tokenizer_of_chunks(self, format_name: str, columns: Mapping[str, str], kept: StoredTexts) -> ChunkTokenizer:
        return ChunkTokenizer(self._tokenizer, self._data, format_name, columns, self._date, kept, self.vocabulary_size)

    def _decisive(
        self, files: Sequence[DataFile], format_name: str, columns: Mapping[str, str], kept: StoredTexts
    ) -> dict[str, Any]:
        """Return everything besides the files' bytes that decides what a store holds."""
        return {
            "kinds": [(file.kind, file.compression, file.begin, file.end) for file in files],
            "format": format_name,
            "columns": dict(columns),
            "settings": [self._data.train_on, self._data.max_length, self._data.overflow],
            "tokenizer": self._identity,
            "vocabulary_size": self.vocabulary_size,
            "date": self._date if is_dated(self._tokenizer) else None,
            "kept": asdict(kept),
            "versions": [version("tokenizers"), version("transformers"), version("jinja2")],
        }


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a sha256 of everything that decides which tokens a tokenizer makes of a conversation."""
    parts = (
        type(tokenizer).__name__,
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else "",
        str(tokenizer.chat_template),
        str(sorted(tokenizer.special_tokens_map.items(), key=str)),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _first_record(file: DataFile) -> Record:
    for chunk in chunks(file, chunk_bytes=CHUNK_BYTES):
        for record in chunk.records():
            return record
    raise _no_rows(file)


def _no_rows(file: DataFile) -> DataError:
    return DataError(f"{file.name}: found no rows; expected at least one")


@dataclass(frozen=True, slots=True)
class _Making:
    """The work of making one store."""

    key: str
    files: Sequence[DataFile]
    format_name: str
    columns: Mapping[str, str]
    num_proc: int | None

    def run(self, folder: Path, tokenize: ChunkTokenizer, dtype: Any) -> None:
        num_bytes = sum(file.path.stat().st_size for file in self.files)
        num_proc = num_processes(self.num_proc, num_bytes, worth_bytes=WORTH_BYTES)
        log.info("%s: tokenising %s (%.1f MB, %d processes)", self.key, self._names(), num_bytes / 1e6, num_proc)
        writer = StoreWriter(folder, self.format_name, dtype)
        num_records = [0] * len(self.files)
        unseen: frozenset[str] | None = None
        with shown_progress(self.key, num_bytes) as advance:
            for chunk in ordered_map(tokenize, self._chunks(), num_proc):
                writer.append(chunk)
                num_records[chunk.file_number] += chunk.num_records
                unseen = chunk.unseen if unseen is None else unseen & chunk.unseen
                advance(chunk.num_bytes)
        writer.close()
        self._check_complete(num_records, unseen or frozenset())

    def _names(self) -> str:
        return self.files[0].name + (f" and {len(self.files) - 1} more files" if len(self.files) > 1 else "")

    def _chunks(self) -> Iterator[tuple[int, bool, Chunk]]:
        for number, file in enumerate(self.files):
            for position, chunk in enumerate(chunks(file, chunk_bytes=CHUNK_BYTES)):
                yield number, position == 0, chunk

    def _check_complete(self, num_records: Sequence[int], unseen: frozenset[str]) -> None:
        for file, count in zip(self.files, num_records, strict=True):
            if not count:
                raise _no_rows(file)
        for column in sorted(unseen):
            renamed = self.columns[column]
            raise DataError(
                f"{self.key}: data.columns says that {column} is called {renamed}, but no row of {self._names()} has a "
                f"column {renamed}; correct the name or remove it"
            )


@contextmanager
def shown_progress(key: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal while a source is tokenised; yield what takes the bytes that are done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _num_bytes: None
        return
    with Progress(
        TextColumn(f"{key}: tokenising"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console,
        transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=num_bytes)
        yield lambda done: progress.advance(task, done)
