"""The rows that a run is measured on, stored in its folder, so that merging and evaluating need no data files.

Stored are all held-out rows and the first training rows: the few-shot examples that a base model is shown, which also
stand in if no rows are held out.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.stored_columns import StoredRow, make_batch, schema
from qlora_train.data.token_store import Rows, Store, StoreWriter, TokenizedChunk
from qlora_train.data.types import Example
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from qlora_train.data.streaming import RowStream

NUM_ROWS, NUM_LABELS = 64, 4096
"""Training rows are stored until there are this many, with this many labels."""
ROWS_PER_BATCH = 1024
ANY_VOCABULARY = 1 << 31
WITHOUT_FILES = ("",)
"""Names of files: a location has its file's name."""
SPLITS = ("train", "eval")


@dataclass(frozen=True, slots=True)
class RunRows:
    """The rows that a run trains on and holds out; for a finished run, those that were stored.

    `num_train_rows` is the number of training rows of an epoch; None for a stream, which has no epochs.
    """

    train: "Rows | RowStream"
    eval: Rows
    num_train_rows: int | None

    def few_shot_examples(self, count: int) -> list[Example]:
        """Return the first training rows whose answer was stored as text, at most `count`."""
        return list(itertools.islice((row for row in self.first_rows() if row.answer is not None), count))

    def first_rows(self) -> Sequence[Example]:
        """Return the training rows, or the beginning of a stream."""
        return self.train if isinstance(self.train, Rows) else self.train.head()


def save_rows(folder: Path, rows: RunRows, fingerprint: str) -> None:
    """Write the rows that a run is measured on.

    A resumed run has them already and may have a full disk: it writes nothing if `fingerprint`, that of the data, agrees.
    """
    metadata = {"num_train_rows": rows.num_train_rows, "data_fingerprint": fingerprint}
    if atomic_io.read_metadata(folder) == metadata and atomic_io.verify_manifest(folder) is None:
        return
    with atomic_io.atomic_folder(folder, metadata) as staging:
        for split, examples in zip(SPLITS, (list(_first(rows.first_rows())), rows.eval), strict=True):
            (staging / split).mkdir()
            _write(staging / split, examples)


def _write(folder: Path, examples: Sequence[Example]) -> None:
    has_pairs = bool(examples) and examples[0].rejected is not None
    is_unpaired = bool(examples) and examples[0].desirable is not None
    columns = schema(ANY_VOCABULARY, has_pairs=has_pairs, is_unpaired=is_unpaired)
    writer = StoreWriter(folder, "stored rows", columns)
    rows = (StoredRow(example, 0, example.where) for example in examples)
    while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
        writer.append(TokenizedChunk(make_batch(batch, columns)))
    writer.close()


def load_rows(folder: Path) -> RunRows:
    """Read the rows that `save_rows` wrote.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    problem = atomic_io.verify_manifest(folder)
    if problem is not None:
        raise CheckpointError(f"{folder}: the rows that this run is measured on: {problem}; restore the folder")
    try:
        train, held_out = (Rows.all_of([Store(folder / split, WITHOUT_FILES)]) for split in SPLITS)
    except (DataError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: malformed ({error}); restore the folder") from None
    return RunRows(train, held_out, atomic_io.read_metadata(folder)["num_train_rows"])


def _first(rows: Sequence[Example]) -> Iterator[Example]:
    num_labels = 0
    for index, row in enumerate(rows):
        if index >= NUM_ROWS and num_labels >= NUM_LABELS:
            return
        num_labels += int(np.count_nonzero(row.loss_mask))
        yield row
