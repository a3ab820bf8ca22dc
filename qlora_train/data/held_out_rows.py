"""The rows that a run is measured on, kept in its folder: merging and evaluating need its data no more.

Kept are all held-out rows, and of the training rows the first: those that stand in where none were held out, and the solved
examples that a base model is shown.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
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
"""Training rows are kept until they are this many, and have this many labels."""
FILES = "files.json"
PARTS = ("train", "eval")


@dataclass(frozen=True, slots=True)
class RunRows:
    """What is trained on and held out; of a finished run, what was kept of it.

    `num_train_rows` is that of an epoch; None for a stream, which has no epochs.
    """

    train: Rows | RowStream
    eval: Rows
    num_train_rows: int | None

    def few_shot_examples(self, count: int) -> list[Example]:
        """Return the first training rows whose answer was kept as text, at most `count`."""
        return list(itertools.islice((row for row in self.first_rows() if row.answer is not None), count))

    def first_rows(self) -> Sequence[Example]:
        """Return the training rows, of a stream its beginning."""
        return self.train.head() if isinstance(self.train, RowStream) else self.train


def save_rows(folder: Path, rows: RunRows, fingerprint: str) -> None:
    """Write what is kept of a run's rows; a resumed run, which may have a full disk, has them already.

    Args:
        folder: is made.
        rows: of the run.
        fingerprint: of the data.
    """
    about = {"num_train_rows": rows.num_train_rows, "data_fingerprint": fingerprint}
    if atomic_io.read_metadata(folder) == about and atomic_io.verify_manifest(folder) is None:
        return
    dtype = np.dtype(np.int32)
    with atomic_io.atomic_folder(folder, about) as staging:
        for part, examples in zip(PARTS, (_first(rows.first_rows()), rows.eval), strict=True):
            store = staging / part
            store.mkdir()
            writer = StoreWriter(store, "kept", dtype)
            files: dict[str, int] = {}
            for example in examples:
                name = example.where.removesuffix(location_suffix(example.where))
                builder = ChunkBuilder(files.setdefault(name, len(files)), dtype)
                builder.add(Record(example.where, {}), example, b"", 0, with_texts=True)
                writer.append(builder.build(num_bytes=0, unseen=frozenset()))
            writer.close()
            (store / FILES).write_text(json.dumps(list(files)), encoding="utf-8")


def load_rows(folder: Path) -> RunRows:
    """Read what `save_rows` wrote.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    problem = atomic_io.verify_manifest(folder)
    if problem is not None:
        raise CheckpointError(f"{folder}: the rows that this run is measured on: {problem}; restore the folder")
    try:
        train, held_out = (
            Rows.every([Store(folder / part, json.loads((folder / part / FILES).read_text(encoding="utf-8")))])
            for part in PARTS
        )
    except (DataError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: is not as it was written ({error}); restore the folder") from None
    return RunRows(train, held_out, atomic_io.read_metadata(folder)["num_train_rows"])


def _first(rows: Sequence[Example]) -> Iterator[Example]:
    num_labels = 0
    for number, row in enumerate(rows):
        if number >= NUM_ROWS and num_labels >= NUM_LABELS:
            return
        num_labels += int(np.count_nonzero(row.loss_mask))
        yield row
