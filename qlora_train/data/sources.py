"""Where the rows of a source lie: a local file, a glob, a folder, or a data set on the Hub.

A path that names a file (a known suffix, a glob, a leading ``./``, ``../``, ``/`` or ``~``, or something that exists)
is never looked for on the Hub, so that a typing error is answered at once with the nearest name.
"""

import difflib
import glob
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from qlora_train.config.schema import Source
from qlora_train.errors import DataError

log = logging.getLogger("qlora_train")

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SUFFIX_LIST = ", ".join(SUFFIXES)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_SETTINGS = {"split": "train", "subset": None, "revision": None}
"""Settings of a source that mean something on the Hub only, and their defaults."""

SAVED_TO_DISK = ("dataset_dict.json", "state.json")
"""Files that datasets' save_to_disk writes beside its .arrow files; they describe rows and hold none."""
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
}  # fmt: skip
"""First words of file names that say which split they hold, as the Hub understands them."""
SPLIT_NAME = re.compile(rf"({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


def local_files(source: Source, key: str) -> list[Path] | None:
    """Return the files of a local source in order, or None for a Hub id.

    Args:
        source: one entry of `data.train` or `data.eval`.
        key: the setting it came from, for messages.

    Raises:
        DataError: nothing is there, the suffix is unknown, or a Hub setting was given for a local path.
    """
    path = Path(source.path).expanduser()
    if not _names_a_file(source.path, path):
        if not HUB_ID.fullmatch(source.path):
            raise DataError(
                f"{key}: {source.path!r} is neither a file nor a Hub id; expected {SUFFIX_LIST} or owner/name"
            )
        return None
    for setting, default in HUB_SETTINGS.items():
        if getattr(source, setting) != default:
            raise DataError(f"{key}: {setting} has no effect on the local path {source.path}; remove it")
    if path.is_file():
        return [_known(path, key)]
    if path.is_dir():
        return _files_of_folder(path, key)
    if glob.has_magic(source.path):
        return _files_of_glob(path, key)
    raise DataError(f"{key}: {source.path} does not exist{_nearest(path)}")


def _names_a_file(text: str, path: Path) -> bool:
    return (
        path.exists()
        or glob.has_magic(text)
        or text.startswith((".", "/", "~"))
        or path.suffix.lower() in SUFFIXES
        or text.count("/") > 1
    )


def _known(path: Path, key: str) -> Path:
    if path.suffix.lower() not in SUFFIXES:
        found = path.suffix or "no suffix"
        raise DataError(f"{key}: {path} cannot be read: found {found}; expected {SUFFIX_LIST}")
    return path


def _files_of_folder(folder: Path, key: str) -> list[Path]:
    entries = sorted(folder.iterdir())
    if marks := [entry.name for entry in entries if entry.name in SAVED_TO_DISK]:
        split = "['train']" * (marks[0] == "dataset_dict.json")
        raise DataError(
            f"{key}: folder {folder} was written by save_to_disk of datasets ({marks[0]}); expected {SUFFIX_LIST}: "
            f"write a file with datasets.load_from_disk('{folder}'){split}.to_parquet('train.parquet')"
        )
    files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    if not files:
        found = ", ".join(entry.name + "/" * entry.is_dir() for entry in entries[:5]) or "no files"
        raise DataError(f"{key}: folder {folder} holds no data file: found {found}; expected {SUFFIX_LIST}")
    _refuse_several_splits(files, f"folder {folder}", key)
    others = ", ".join(entry.name for entry in entries if entry not in files)
    log.info(
        "%s: folder %s: reading %s%s",
        key,
        folder,
        ", ".join(file.name for file in files),
        f"; not {others}" * bool(others),
    )
    return files


def _files_of_glob(pattern: Path, key: str) -> list[Path]:
    files = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True)) if Path(match).is_file()]  # noqa: PTH207
    if not files:
        raise DataError(f"{key}: the pattern {pattern} matches no file; check the folder and the suffix")
    _refuse_several_splits(files, f"the pattern {pattern}", key)
    return [_known(file, key) for file in files]


def _refuse_several_splits(files: Sequence[Path], place: str, key: str) -> None:
    """Refuse to read a data set's train and test files as one: held-out rows would be trained on."""
    splits: dict[str, str] = {}
    for file in files:
        match = SPLIT_NAME.match(file.stem)
        if match:
            splits.setdefault(SPLITS[match.group().lower()], file.name)
    if len(splits) > 1:
        raise DataError(
            f"{key}: {place} holds files of several splits: {', '.join(splits.values())}; name the one that is meant, "
            "or list the files if all are"
        )


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; its folder {path.parent} does not exist either"
    names = [entry.name for entry in path.parent.iterdir()]
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / nearest[0]}?" if nearest else f"; the folder is {path.parent.resolve()}"
