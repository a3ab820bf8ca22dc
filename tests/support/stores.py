"""Stores of given rows, for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qlora_train.data.token_store import Rows, Store, StoreWriter, token_dtype
from qlora_train.data.tokenize_chunk import ChunkBuilder
from qlora_train.data.types import Example, Record


def example(ids: Sequence[int], mask: Sequence[int], **texts: object) -> Example:
    """Return an example of these tokens; `mask` has a 1 for a label."""
    return Example("file.jsonl:1", np.array(ids, np.int32), np.array(mask, np.bool_), **texts)  # type: ignore[arg-type]


def store_of(
    folder: Path, examples: Sequence[Example], *, digests: Sequence[int] | None = None, vocabulary_size: int = 1000
) -> Store:
    """Write a store in two chunks and open it; row n is line n + 1 with the digest `digests[n]`, or one of its own."""
    folder.mkdir()
    writer = StoreWriter(folder, "text", token_dtype(vocabulary_size))
    half = (len(examples) + 1) // 2
    for start in (0, half):
        builder = ChunkBuilder(0, token_dtype(vocabulary_size))
        for number, each in enumerate(examples[start : start + half], start):
            builder.num_records += 1
            content = number if digests is None else digests[number]
            digest = content.to_bytes(16, "little")
            builder.add(Record(f"file.jsonl:{number + 1}", {}), each, digest, 0, with_texts=True)
        writer.append(builder.build(num_bytes=100, unseen=frozenset()))
    writer.close()
    return Store(folder, ["file.jsonl"])


def rows_of(folder: Path, examples: Sequence[Example], *, digests: Sequence[int] | None = None) -> Rows:
    """Return all rows of a new store."""
    return Rows.all_of([store_of(folder, examples, digests=digests)])
