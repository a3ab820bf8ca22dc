"""One chunk of a source -> its tokens: what a worker process does. It reads, renders, and cuts rows to length.

A row that cannot be used is counted with its reason and location; malformed files raise.
"""

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora_train.config.objectives import DatasetType
from qlora_train.config.schema import DataSection
from qlora_train.data.overflow import apply_overflow
from qlora_train.data.pair_layouts import SEVERAL_REJECTED
from qlora_train.data.readers import Chunk
from qlora_train.data.reason_counts import ReasonCounts
from qlora_train.data.row_encoder import RowEncoder
from qlora_train.data.row_reader import RowReader
from qlora_train.data.selection import StoredTexts
from qlora_train.data.stored_columns import StoredRow, make_batch, schema
from qlora_train.data.token_store import TokenizedChunk
from qlora_train.data.types import Example, Message, Record, Row, UnusableRowError
from qlora_train.utils.errors import DataError


def content_digest(row: Row) -> bytes:
    """Return 16 bytes that identify a row's content, independent of its file and line."""
    content: list[object] = [row.messages, row.prompt, row.text, row.loss_from]
    if row.untrained or row.tools or row.input_ids:  # most rows have none of these
        content += [sorted(row.untrained), row.tools, row.input_ids, row.loss_mask]
    if row.chat_template_kwargs:
        content.append(row.chat_template_kwargs)
    if row.rejected is not None:
        content.append(content_digest(row.rejected).hex())
    if row.desirable is not None:
        content.append(row.desirable)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()[:16]


def prompt_digest(row: Row) -> bytes:
    """Return 16 bytes that identify what comes before the answers of a preference."""
    turns = None if row.messages is None else row.messages[: row.loss_from]
    content = [turns, row.prompt, row.tools, row.chat_template_kwargs]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()[:16]


def swapped_digest(row: Row) -> bytes:
    """Return the `content_digest` of a preference pair with its answers swapped."""
    assert row.rejected is not None
    return content_digest(replace(row.rejected, rejected=replace(row, rejected=None)))


def system_prompt_of(turns: Sequence[Message]) -> str:
    """Return the system prompt of a conversation, empty if there is none."""
    return turns[0]["content"] if turns[0]["role"] == "system" else ""


def _numbered_parts(
    chunk: Chunk, reader: RowReader, file_number: int, warned: ReasonCounts
) -> Iterator[tuple[int, Record]]:
    """Yield the records of a chunk, those with several rejected answers in parts, each with its number in the chunk."""
    for number, record in enumerate(chunk.records()):
        parts = reader.split(record)
        if len(parts) > 1:
            warned.add(SEVERAL_REJECTED, f"{file_number}{location_suffix(record.where)}")
        for part in parts:
            yield number, part


class ChunkTokenizer:
    """Tokenises the chunks of one source.

    Args:
        format_name: of the source's rows.
        columns: the format's column names -> the file's.
        date: the day that dated chat templates print.
        stored_texts: rows that store their texts.
        vocabulary_size: token ids of the model; a row with another one cannot be used.
        dataset_type: that the objective trains on.

    Attributes:
        columns: of a store of the rows.
    """

    def __init__(
        self,
        tokenizer: Any,
        data: DataSection,
        format_name: str,
        columns: Mapping[str, str],
        date: datetime.date,
        stored_texts: StoredTexts,
        vocabulary_size: int,
        dataset_type: DatasetType,
    ) -> None:
        self._encoder = RowEncoder(tokenizer, train_on=data.train_on, date=date)
        self._data, self._format, self._columns, self._stored_texts = data, format_name, columns, stored_texts
        self._is_unpaired = dataset_type == "unpaired_preference"
        self.columns = schema(vocabulary_size, has_pairs=dataset_type == "preference", is_unpaired=self._is_unpaired)
        self._vocabulary_size, self._tokenizer, self._bos = vocabulary_size, tokenizer, tokenizer.bos_token_id

    def __call__(self, numbered: tuple[int, bool, Chunk]) -> TokenizedChunk:
        """Tokenise a chunk of the file with this number; the flag is set for the file's first chunk.

        Raises:
            DataError: the chunk is malformed, lacks a column, or holds a row that `overflow: refuse` refuses.
        """
        file_number, is_first, chunk = numbered
        reader = RowReader(self._format, self._columns)
        dropped, warned, systems = ReasonCounts(), ReasonCounts(), Counter[str]()
        rows: list[StoredRow] = []
        num_records = 0
        for number, record in _numbered_parts(chunk, reader, file_number, warned):
            num_records += 1
            location = location_suffix(record.where)
            try:
                row = reader.read(record)
                digest = content_digest(row)
                examples = self._examples_of(row)
            except UnusableRowError as error:
                dropped.add(error.reason, f"{file_number}{location}")
                continue
            if row.messages is not None:
                systems[system_prompt_of(row.messages)] += 1
            is_preference = row.rejected is not None or row.desirable is not None
            group = prompt_digest(row) if is_preference else digest
            swapped = bytes(16) if row.rejected is None else swapped_digest(row)
            with_texts = self._stored_texts.include(number if is_first else self._stored_texts.num_examples, group)
            for part, example in enumerate(examples):
                for warning in example.warnings:
                    warned.add(warning, f"{file_number}{location}")
                stored = example if with_texts else replace(example, prompt=None, answer=None)
                rows.append(StoredRow(stored, file_number, location, digest, part, group, swapped))
        return TokenizedChunk(
            make_batch(rows, self.columns),
            file_number, num_records, chunk.num_bytes, dropped, warned, frozenset(reader.unseen), systems,
        )  # fmt: skip

    def _examples_of(self, row: Row) -> list[Example]:
        """Return a row in parts, or a preference pair as one example, or as two with labels."""
        chosen = self._sequences_of(row)
        if row.desirable is not None:
            return [with_label(example, desirable=row.desirable) for example in chosen]
        if row.rejected is None:
            return chosen
        [example], [rejected] = chosen, self._sequences_of(row.rejected)
        if example.input_ids.tolist() == rejected.input_ids.tolist():
            raise UnusableRowError("chosen and rejected are equal")
        if self._is_unpaired:
            return [with_label(example, desirable=True), with_label(rejected, desirable=False)]
        warnings = dict.fromkeys((*example.warnings, *rejected.warnings))
        return [replace(example, rejected=rejected, warnings=tuple(warnings))]

    def _sequences_of(self, row: Row) -> list[Example]:
        example = self._encoder.encode(row)
        if row.warnings:
            example = replace(example, warnings=(*row.warnings, *example.warnings))
        self._check_ids(row, example)
        return apply_overflow(example, max_length=self._data.max_length, overflow=self._data.overflow, bos=self._bos)

    def _check_ids(self, row: Row, example: Example) -> None:
        beyond = sorted(set(example.input_ids[example.input_ids >= self._vocabulary_size].tolist()))
        if not beyond:
            return
        if row.input_ids is not None:
            raise UnusableRowError(f"a token id beyond the model's vocabulary ({self._vocabulary_size} tokens)")
        tokens = self._tokenizer.convert_ids_to_tokens(beyond)
        raise DataError(
            f"{row.where}: tokens of the tokenizer that the model's embedding has no rows for ({self._vocabulary_size} "
            f"rows): {', '.join(f'{token!r} ({i})' for token, i in zip(tokens, beyond, strict=True))}; learn them with "
            f"model.new_tokens: {tokens!r}, or give the base that this tokenizer belongs to"
        )


def with_label(example: Example, *, desirable: bool) -> Example:
    """Return an unpaired preference; an undesirable answer is none to compare generated ones with."""
    labelled = example.with_label(desirable=desirable)
    return labelled if desirable else replace(labelled, prompt=None, answer=None)


def location_suffix(where: str) -> str:
    """Return the part of a location behind the file's name: ``:12`` or ``:row 12``."""
    return where[where.rindex(":") :]
