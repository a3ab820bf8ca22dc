"""Stores of given rows, for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qlora_train.data.stored_columns import StoredRow, make_batch, schema
from qlora_train.data.token_store import Rows, Store, StoreWriter, TokenizedChunk
from qlora_train.data.types import Example


def example(ids: Sequence[int], mask: Sequence[int], **texts: object) -> Example:
    """Return an example of these tokens; `mask` has a 1 for a label."""
    return Example("file.jsonl:1", np.array(ids, np.int32), np.array(mask, np.bool_), **texts)  # type: ignore[arg-type]


def store_of(
    folder: Path, examples: Sequence[Example], *, digests: Sequence[int] | None = None, vocabulary_size: int = 1000
) -> Store:
    """Write a store in two chunks and open it; row n is line n + 1 with the digest `digests[n]`, or one of its own."""
    folder.mkdir()
    columns = schema(vocabulary_size, has_pairs=any(each.rejected is not None for each in examples))
    writer = StoreWriter(folder, "text", columns)
    keys = range(len(examples)) if digests is None else digests
    rows = [
        StoredRow(each, 0, f":{number}", key.to_bytes(16, "little"))
        for number, (each, key) in enumerate(zip(examples, keys, strict=True), 1)
    ]
    half = (len(examples) + 1) // 2
    for part in (rows[:half], rows[half:]):
        writer.append(TokenizedChunk(make_batch(part, columns), num_records=len(part)))
    writer.close()
    return Store(folder, ["file.jsonl"])


def rows_of(folder: Path, examples: Sequence[Example], *, digests: Sequence[int] | None = None) -> Rows:
    """Return all rows of a new store."""
    return Rows.all_of([store_of(folder, examples, digests=digests)])
