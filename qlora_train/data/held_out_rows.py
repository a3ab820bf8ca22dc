"""The rows that a run is measured on, stored in its folder, so that merging and evaluating need no data files.

Stored are all held-out rows and the first training rows: the few-shot examples that a base model is shown, which also
stand in if no rows are held out.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_train.data.streaming import RowStream
from qlora_train.data.token_store import Rows, Store, StoreWriter
from qlora_train.data.tokenize_chunk import ChunkBuilder, location_suffix
from qlora_train.data.types import Example, Record
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import CheckpointError, DataError

NUM_ROWS, NUM_LABELS = 64, 4096
"""Training rows are stored until there are this many, with this many labels."""
FILES = "files.json"
SPLITS = ("train", "eval")


@dataclass(frozen=True, slots=True)
class RunRows:
    """The rows that a run trains on and holds out; for a finished run, those that were stored.

    `num_train_rows` is the number of training rows of an epoch; None for a stream, which has no epochs.
    """

    train: Rows | RowStream
    eval: Rows
    num_train_rows: int | None

    def few_shot_examples(self, count: int) -> list[Example]:
        """Return the first training rows whose answer was stored as text, at most `count`."""
        return list(itertools.islice((row for row in self.first_rows() if row.answer is not None), count))

    def first_rows(self) -> Sequence[Example]:
        """Return the training rows, or the beginning of a stream."""
        return self.train.head() if isinstance(self.train, RowStream) else self.train


def save_rows(folder: Path, rows: RunRows, fingerprint: str) -> None:
    """Write the rows that a run is measured on.

    A resumed run has them already and may have a full disk: it writes nothing if `fingerprint`, that of the data, agrees.
    """
    metadata = {"num_train_rows": rows.num_train_rows, "data_fingerprint": fingerprint}
    if atomic_io.read_metadata(folder) == metadata and atomic_io.verify_manifest(folder) is None:
        return
    with atomic_io.atomic_folder(folder, metadata) as staging:
        for split, examples in zip(SPLITS, (_first(rows.first_rows()), rows.eval), strict=True):
            (staging / split).mkdir()
            _write(staging / split, examples)


def _write(folder: Path, examples: Iterable[Example]) -> None:
    dtype = np.dtype(np.int32)
    writer = StoreWriter(folder, "stored rows", dtype)
    files: dict[str, int] = {}
    for example in examples:
        name = example.where.removesuffix(location_suffix(example.where))
        builder = ChunkBuilder(files.setdefault(name, len(files)), dtype)
        builder.add(Record(example.where, {}), example, b"", 0, with_texts=True)
        writer.append(builder.build(num_bytes=0, unseen=frozenset()))
    writer.close()
    (folder / FILES).write_text(json.dumps(list(files)), encoding="utf-8")


def load_rows(folder: Path) -> RunRows:
    """Read the rows that `save_rows` wrote.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    problem = atomic_io.verify_manifest(folder)
    if problem is not None:
        raise CheckpointError(f"{folder}: the rows that this run is measured on: {problem}; restore the folder")
    try:
        train, held_out = (
            Rows.all_of([Store(folder / split, json.loads((folder / split / FILES).read_text(encoding="utf-8")))])
            for split in SPLITS
        )
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
