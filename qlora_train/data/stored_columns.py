"""Columns of stored rows: examples to a record batch and back.

The tokens and mask of a preference pair are those of the chosen sequence, then of the rejected one.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow

from qlora_train.data.types import Example

EXAMPLE_COLUMNS = ("file", "location", "tokens", "mask", "prompt", "answer", "warnings")
REJECTED_LENGTH = "rejected_length"
"""Column of a store of preference pairs: tokens of each rejected sequence."""
REJECTED_LABELS = "rejected_labels"
"""Label tokens of each rejected sequence."""
PROMPT_DIGEST = "prompt_digest"
"""Hash of the prompt, which several pairs or answers with labels may share."""
SWAPPED_DIGEST = "swapped_digest"
"""Digest of the pair with its answers swapped."""
DIGESTS = ("digest", PROMPT_DIGEST, SWAPPED_DIGEST)
DESIRABLE, PROMPT_LENGTH = "desirable", "prompt_length"
"""Columns of a store of unpaired preferences: the label, and the tokens before the answer."""


def schema(vocabulary_size: int, *, has_pairs: bool = False, is_unpaired: bool = False) -> pyarrow.Schema:
    """Return the columns of a store, with the smallest type that holds every token id."""
    token = pyarrow.uint16() if vocabulary_size <= 1 << 16 else pyarrow.int32()
    digest = pyarrow.list_(pyarrow.uint64(), 2)
    pairs = {REJECTED_LENGTH: pyarrow.int32(), REJECTED_LABELS: pyarrow.int32()} if has_pairs else {}
    pairs |= {PROMPT_DIGEST: digest, SWAPPED_DIGEST: digest} if has_pairs else {}
    unpaired = (
        {DESIRABLE: pyarrow.bool_(), PROMPT_LENGTH: pyarrow.int32(), PROMPT_DIGEST: digest} if is_unpaired else {}
    )
    return pyarrow.schema(
        {
            "tokens": pyarrow.list_(token),
            "mask": pyarrow.list_(pyarrow.bool_()),  # true for a label
            "length": pyarrow.int32(),  # tokens
            "num_labels": pyarrow.int32(),
            "digest": digest,  # hash of the row's content
            "part": pyarrow.int32(),  # index among the parts of a row that was split
            "file": pyarrow.int32(),  # index in the source
            "location": pyarrow.string(),  # in the file
            "prompt": pyarrow.string(),  # JSON; null if it is not stored
            "answer": pyarrow.string(),
            "warnings": pyarrow.list_(pyarrow.string()),
            **pairs,
            **unpaired,
        }
    )


class StoredRow(NamedTuple):
    """A row of a store; its example has a prompt and an answer only if they are stored."""

    example: Example
    file: int
    location: str
    digest: bytes = bytes(16)
    part: int = 0
    prompt_digest: bytes = bytes(16)
    swapped_digest: bytes = bytes(16)


def make_batch(rows: Sequence[StoredRow], columns: pyarrow.Schema) -> pyarrow.RecordBatch:
    """Return rows as a record batch."""
    examples = [row.example for row in rows]
    sequences = [sequence for each in examples for sequence in each.sequences]
    lengths = np.array([each.num_tokens for each in examples], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = np.concatenate([np.empty(0, np.int32), *(each.input_ids for each in sequences)])
    mask = np.concatenate([np.empty(0, np.bool_), *(each.loss_mask for each in sequences)])
    token_type = columns.field("tokens").type.value_type
    values = {
        "tokens": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(tokens).cast(token_type)),
        "mask": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(mask)),
        "length": lengths,
        "num_labels": [each.num_labels for each in examples],
        "digest": _digest_array([row.digest for row in rows]),
        "part": [row.part for row in rows],
        "file": [row.file for row in rows],
        "location": [row.location for row in rows],
        "prompt": [None if each.prompt is None else json.dumps(each.prompt) for each in examples],
        "answer": [each.answer for each in examples],
        "warnings": [each.warnings for each in examples],
    }
    if REJECTED_LENGTH in columns.names:
        rejected = [each.rejected for each in examples]
        values[REJECTED_LENGTH] = [0 if each is None else each.num_tokens for each in rejected]
        values[REJECTED_LABELS] = [0 if each is None else each.num_labels for each in rejected]
    if PROMPT_DIGEST in columns.names:
        values[PROMPT_DIGEST] = _digest_array([row.prompt_digest for row in rows])
    if SWAPPED_DIGEST in columns.names:
        values[SWAPPED_DIGEST] = _digest_array([row.swapped_digest for row in rows])
    if DESIRABLE in columns.names:
        values[DESIRABLE] = [each.desirable for each in examples]
        values[PROMPT_LENGTH] = [each.prompt_length for each in examples]
    return pyarrow.record_batch(values, schema=columns)


def _digest_array(digests: Sequence[bytes]) -> pyarrow.Array:
    return pyarrow.FixedSizeListArray.from_arrays(np.frombuffer(b"".join(digests), np.uint64), 2)


def read_example(rows: pyarrow.RecordBatch | pyarrow.Table, index: int, files: Sequence[str]) -> Example:
    """Return one row; `files` are the names of the source's files. Tokens and mask are copies."""
    row = {name: rows.column(name)[index] for name in EXAMPLE_COLUMNS}
    prompt = json.loads(row["prompt"].as_py() or "null")
    example = Example(
        where=f"{files[row['file'].as_py()]}{row['location']}",
        input_ids=row["tokens"].values.to_numpy().astype(np.int32),
        loss_mask=row["mask"].values.to_numpy(zero_copy_only=False),
        prompt=tuple(prompt) if isinstance(prompt, list) else prompt,
        answer=row["answer"].as_py(),
        warnings=tuple(row["warnings"].as_py()),
    )
    if DESIRABLE in rows.schema.names:
        return replace(example, desirable=rows.column(DESIRABLE)[index].as_py())
    if REJECTED_LENGTH not in rows.schema.names:
        return example
    return split_pair(example, rows.column(REJECTED_LENGTH)[index].as_py())


def split_pair(example: Example, num_rejected: int) -> Example:
    """Return tokens and mask of a pair, one after the other, as the chosen sequence with the rejected one."""
    num_chosen = len(example.input_ids) - num_rejected
    ids, mask = example.input_ids, example.loss_mask
    rejected = Example(example.where, ids[num_chosen:], mask[num_chosen:])
    return replace(example, input_ids=ids[:num_chosen], loss_mask=mask[:num_chosen], rejected=rejected)
