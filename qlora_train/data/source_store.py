"""A source of the config -> its tokenised rows: from the cache, tokenised now, or streamed."""

import datetime
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_train.config.objectives import DatasetType
from qlora_train.config.schema import DataSection, Source
from qlora_train.data.chat_template import is_dated
from qlora_train.data.data_file import DataFile
from qlora_train.data.formats import check_renames, recognise
from qlora_train.data.readers import Chunk, read_chunks
from qlora_train.data.selection import StoredTexts
from qlora_train.data.sources import find_files
from qlora_train.data.token_cache import StoreCache, cache_key
from qlora_train.data.token_store import Store, StoreWriter
from qlora_train.data.types import Record
from qlora_train.data.worker_pool import num_processes, ordered_map
from qlora_train.utils.errors import DataError
from qlora_train.utils.run_events import progress

if TYPE_CHECKING:  # a run with its rows in the cache needs neither
    from qlora_train.data.streaming import StreamedSource
    from qlora_train.data.tokenize_chunk import ChunkTokenizer

log = logging.getLogger("qlora_train")

CHUNK_BYTES = 1 << 20
PLAIN_FORMATS = ("text", "tokens")
MIN_PARALLEL_BYTES = 4 << 20
"""Size of a source from which on worker processes pay."""


@dataclass(frozen=True, slots=True)
class SourceStore:
    """A source of the config and its tokenised rows; `cached` if an earlier run tokenised them."""

    source: Source
    store: Store
    cached: bool

    @property
    def is_plain(self) -> bool:
        """Whether its tokens do not depend on the chat template."""
        return self.store.summary.format in PLAIN_FORMATS


@dataclass(frozen=True, slots=True)
class _OpenSource:
    """The files of a source, the format of their rows, and the format's column names -> the files'."""

    key: str
    files: Sequence[DataFile]
    format: str
    columns: Mapping[str, str]

    @property
    def file_names(self) -> list[str]:
        return [file.name for file in self.files]

    def chunks(self) -> Iterator[tuple[int, bool, Chunk]]:
        """Yield (index of the file, whether the chunk is its first, chunk)."""
        for index, file in enumerate(self.files):
            for position, chunk in enumerate(read_chunks(file, chunk_bytes=CHUNK_BYTES)):
                yield index, position == 0, chunk


class SourceTokenizer:
    """Tokenises the sources of a run.

    Args:
        date: the day that dated chat templates print.
        vocabulary_size: token ids that the model has.
        dataset_type: that the objective trains on.
    """

    def __init__(
        self,
        data: DataSection,
        tokenizer: Any,
        date: datetime.date,
        vocabulary_size: int,
        dataset_type: DatasetType,
    ) -> None:
        self._data, self._tokenizer, self._date, self.vocabulary_size = data, tokenizer, date, vocabulary_size
        self._dataset_type = dataset_type
        self._cache = StoreCache(data.cache_dir, data.cache_limit)
        self._tokenizer_hash = tokenizer_hash(tokenizer)

    def store(self, key: str, source: Source, kept: StoredTexts) -> SourceStore:
        """Return the store of a source.

        Args:
            key: ``data.train`` or ``data.eval``, for messages.
            kept: rows whose prompt and answer are stored as text.

        Raises:
            ConfigError: the format does not have a column of that name.
            DataError: the source is missing, malformed or empty, or its columns fit no format, or several.
        """
        opened = self._open(key, source)
        name = cache_key([file.path for file in opened.files], self._settings(opened, kept))
        store, cached = self._cache.get(
            name,
            lambda folder: self._write(folder, opened, self._chunk_tokenizer(opened, kept)),
            lambda folder: Store(folder, opened.file_names),
        )
        if cached:
            log.debug("%s: %s: tokenised before, read from %s", key, source.path, self._cache.folder / name)
        return SourceStore(source, store, cached)

    def streamed(self, key: str, source: Source) -> "StreamedSource":
        """Return a source that is tokenised during training.

        Raises:
            ConfigError, DataError: as `store` does; and a file whose rows can only be read from its beginning.
        """
        from qlora_train.data.streaming import StreamedSource

        opened = self._open(key, source)
        for file in opened.files:
            _first_record(file)  # refuses a file without rows
        chunks = list(opened.chunks())
        for index, _, chunk in chunks:
            if chunk.holds_rows:
                raise DataError(
                    f"{key}: {opened.files[index].name} cannot be streamed, since its rows can only be read from its "
                    "beginning; expected jsonl, txt, arrow or parquet without compression"
                )
        kept = StoredTexts(everything=True)  # nothing is stored
        settings = {**self._settings(opened, kept), "chunk_bytes": CHUNK_BYTES}
        identity = cache_key([file.path for file in opened.files], settings)
        tokenize = self._chunk_tokenizer(opened, kept)
        return StreamedSource(source.path, opened.format, opened.file_names, chunks, tokenize, identity)

    def _open(self, key: str, source: Source) -> _OpenSource:
        files = find_files(source, key)
        columns = self._data.columns if source.columns is None else source.columns
        wanted = source.format or self._data.format
        # data.columns may name columns of another source's format
        check_renames("auto" if source.columns is None and source.format else wanted, columns, self._dataset_type)
        format_name = recognise(_first_record(files[0]), wanted, columns, self._dataset_type)
        return _OpenSource(key, files, format_name, columns)

    def _chunk_tokenizer(self, opened: _OpenSource, kept: StoredTexts) -> "ChunkTokenizer":
        from qlora_train.data.tokenize_chunk import ChunkTokenizer

        return ChunkTokenizer(
            self._tokenizer, self._data, opened.format, opened.columns, self._date, kept, self.vocabulary_size,
            self._dataset_type,
        )  # fmt: skip

    def _settings(self, opened: _OpenSource, kept: StoredTexts) -> dict[str, Any]:
        """Return everything besides the files' bytes that decides the content of a store."""
        return {
            "kinds": [(file.kind, file.compression, file.begin, file.end) for file in opened.files],
            "format": opened.format,
            "dataset_type": self._dataset_type,
            "columns": dict(opened.columns),
            "settings": [self._data.train_on, self._data.max_length, self._data.overflow],
            "tokenizer": self._tokenizer_hash,
            "vocabulary_size": self.vocabulary_size,
            "date": self._date if is_dated(self._tokenizer) else None,
            "kept": asdict(kept),
            "versions": [version("tokenizers"), version("transformers"), version("jinja2")],
        }

    def _write(self, folder: Path, opened: _OpenSource, tokenize: "ChunkTokenizer") -> None:
        num_bytes = sum(file.path.stat().st_size for file in opened.files)
        num_proc = num_processes(self._data.num_proc, num_bytes, min_bytes=MIN_PARALLEL_BYTES)
        names = opened.files[0].name + (f" and {len(opened.files) - 1} more files" if len(opened.files) > 1 else "")
        log.debug("%s: tokenising %s (%.1f MB, %d processes)", opened.key, names, num_bytes / 1e6, num_proc)
        writer = StoreWriter(folder, opened.format, tokenize.columns)
        num_records = [0] * len(opened.files)
        unseen: frozenset[str] | None = None
        with progress(f"{opened.key}: tokenising", num_bytes, "bytes") as counter:
            for chunk in ordered_map(tokenize, opened.chunks(), num_proc):
                writer.append(chunk)
                num_records[chunk.file_number] += chunk.num_records
                unseen = chunk.unseen if unseen is None else unseen & chunk.unseen
                counter.advance(chunk.num_bytes)
        writer.close()
        for file, count in zip(opened.files, num_records, strict=True):
            if not count:
                raise _no_rows(file)
        for column in sorted(unseen or ()):
            renamed = opened.columns[column]
            raise DataError(
                f"{opened.key}: data.columns says that {column} is called {renamed}, but no row of {names} has a column "
                f"{renamed}; correct the name or remove it"
            )


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a sha256 of everything that decides which tokens a tokenizer makes of a conversation."""
    parts = (
        type(tokenizer).__name__,
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else "",
        str(tokenizer.chat_template),
        str(sorted(tokenizer.special_tokens_map.items(), key=str)),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _first_record(file: DataFile) -> Record:
    for chunk in read_chunks(file, chunk_bytes=CHUNK_BYTES):
        for record in chunk.records():
            return record
    raise _no_rows(file)


def _no_rows(file: DataFile) -> DataError:
    return DataError(f"{file.name}: found no rows; expected at least one")
