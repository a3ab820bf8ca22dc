"""Data sets of the Hub: `datasets` downloads them into its cache of Arrow files, which are read like any others.

Images and audio stay undecoded, so that a data set with them needs no further library as long as only its text is used.
"""

import logging
from pathlib import Path
from typing import Any

from qlora_train.config.schema import Source
from qlora_train.data.data_file import DataFile
from qlora_train.data.readers.arrow import count_rows
from qlora_train.utils import network
from qlora_train.utils.errors import DataError, first_line

log = logging.getLogger("qlora_train")


def hub_files(source: Source, key: str) -> list[DataFile]:
    """Download a data set and return the Arrow files of its split, which may be ``train[:10%]`` or ``train+test``.

    Raises:
        DataError: it cannot be loaded, or has no such split.
    """
    import datasets

    name = f"{source.path}[{source.split}]"
    log.debug("%s: loading the Hub data set %s", key, name)
    try:
        loaded = datasets.load_dataset(source.path, source.subset, revision=source.revision, keep_in_memory=False)
        num_rows = {split: len(rows) for split, rows in loaded.items()}
        ranges = datasets.ReadInstruction.from_spec(source.split).to_absolute(num_rows)
        return _files_of_ranges(name, [(loaded[it.splitname], it.from_, it.to) for it in ranges])
    except ConnectionError:
        raise DataError(f"{key}: the Hub data set {name} {network.unreachable_reason()}") from None
    except Exception as error:  # datasets, huggingface_hub, httpx and fsspec each raise their own kinds
        raise DataError(
            f"{key}: the Hub data set {name} cannot be loaded: {type(error).__name__}: {first_line(error).rstrip('.;')}; "
            "check the name, subset, split and revision, the network, and `hf auth login` where access is gated"
        ) from None


def _files_of_ranges(name: str, ranges: list[tuple[Any, int, int]]) -> list[DataFile]:
    """Return the files of ranges of rows, each (data set, first row, row behind the last)."""
    files: list[DataFile] = []
    num_before = 0
    for rows, begin, end in ranges:
        start = 0
        for path in (Path(entry["filename"]) for entry in rows.cache_files):
            num_rows = count_rows(path)
            first, last = max(begin - start, 0), min(end - start, num_rows)
            if first < last:
                files.append(DataFile(path, name, "arrow", begin=first, end=last, first_row=num_before + 1))
                num_before += last - first
            start += num_rows
        assert start == len(rows), f"{start} rows in the files of {name}, {len(rows)} in the data set"
    return files
