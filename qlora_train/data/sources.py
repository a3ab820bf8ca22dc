"""The files of a source: a local file, a glob, a folder, or a data set on the Hub.

A path that names a file (a known suffix, a glob, a leading ``./``, ``../``, ``/`` or ``~``, or an existing path) is never
looked up on the Hub, so that a typing error is answered at once with the nearest name.
"""

import glob
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from qlora_train.config.path_checks import ALIASES, COMPRESSIONS, TEXT_KINDS, data_file_type, is_local_data
from qlora_train.config.preflight import missing_data, no_match
from qlora_train.config.schema import Source
from qlora_train.data.data_file import DataFile
from qlora_train.utils.errors import DataError

log = logging.getLogger("qlora_train")

SUFFIX_LIST = f"{', '.join(f'.{kind}' for kind in (*TEXT_KINDS, *ALIASES))} (also .gz or .zst), .parquet, .arrow"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_SETTINGS = {"split": "train", "subset": None, "revision": None}
"""Settings of a source that mean nothing for a plain file, and their defaults."""
SAVED_DICT, SAVED_DATASET = "dataset_dict.json", "state.json"
"""What `save_to_disk` writes beside a folder per split, and beside the .arrow files of one."""
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
}  # fmt: skip
"""Words in file names -> the split they name, as on the Hub."""
SPLIT_NAME = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


def find_files(source: Source, key: str) -> list[DataFile]:
    """Return the files of a source, in order; those of a Hub data set are downloaded.

    Args:
        source: an entry of `data.train` or `data.eval`.
        key: the setting it came from, for messages.

    Raises:
        DataError: nothing is found, the suffix is unknown, splits or kinds are mixed, or a setting has no effect.
    """
    path = Path(source.path).expanduser()
    try:
        if is_local_data(source.path):
            return _local_files(source, path, key)
    except OSError as error:
        raise DataError(f"{key}: {source.path} cannot be read: {error.strerror}") from None
    if not HUB_ID.fullmatch(source.path):
        raise DataError(f"{key}: {source.path!r} is neither a file nor a Hub id; expected {SUFFIX_LIST} or owner/name")
    from qlora_train.data.hub_datasets import hub_files

    return hub_files(source, key)


def _local_files(source: Source, path: Path, key: str) -> list[DataFile]:
    if path.is_dir() and any((path / name).is_file() for name in (SAVED_DICT, SAVED_DATASET)):
        return _files_of_saved(source, path, key)
    _refuse_hub_settings(source, HUB_SETTINGS, key)
    if path.is_file():
        return [_data_file(path, key)]
    if path.is_dir():
        return _files_of_folder(path, key)
    if path.exists():
        raise DataError(f"{key}: {path} is neither a file nor a folder (a pipe or a device); write its rows to a file")
    if problem := missing_data(source.path):
        raise DataError(f"{key}: {problem}")
    return _files_of_glob(path, key)


def _refuse_hub_settings(source: Source, settings: Iterable[str], key: str) -> None:
    for setting in settings:
        if getattr(source, setting) != HUB_SETTINGS[setting]:
            raise DataError(f"{key}: {setting} has no effect on the local path {source.path}; remove it")


def _data_file(path: Path, key: str) -> DataFile:
    known = data_file_type(path)
    if known is None:
        found = "".join(path.suffixes[-2:]) if path.suffix[1:].lower() in COMPRESSIONS else path.suffix
        raise DataError(f"{key}: {path} cannot be read: found {found or 'no suffix'}; expected {SUFFIX_LIST}")
    return DataFile(path, str(path), *known)


def _files_of_folder(folder: Path, key: str) -> list[DataFile]:
    entries = sorted(folder.iterdir())
    visible = [entry for entry in entries if not entry.name.startswith(".") and not entry.is_dir()]
    files = [_data_file(entry, key) for entry in visible if data_file_type(entry) is not None]
    if not files:
        found = ", ".join(entry.name + "/" * entry.is_dir() for entry in entries[:5]) or "no files"
        raise DataError(f"{key}: folder {folder} holds no data file: found {found}; expected {SUFFIX_LIST}")
    _refuse_several_splits(files, f"folder {folder}", key)
    _refuse_several_kinds(files, folder, key)
    paths = {file.path for file in files}
    others = ", ".join(entry.name for entry in entries if entry not in paths)
    names = ", ".join(file.path.name for file in files)
    log.debug("%s: folder %s: reading %s%s", key, folder, names, f"; not {others}" * bool(others))
    return files


def _files_of_glob(pattern: Path, key: str) -> list[DataFile]:
    paths = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True)) if not Path(match).is_dir()]  # noqa: PTH207
    if not paths:
        raise DataError(f"{key}: {no_match(pattern)}")
    files = [_data_file(path, key) for path in paths]
    _refuse_several_splits(files, f"the pattern {pattern}", key)
    return files


def _refuse_several_splits(files: Sequence[DataFile], place: str, key: str) -> None:
    """Refuse to read a data set's train and test files as one: held-out rows would be trained on."""
    # if no file name shows a split, the name of its folder may
    splits = _splits_of(files, lambda path: path.name) or _splits_of(files, lambda path: path.parent.name)
    if len(splits) > 1:
        raise DataError(
            f"{key}: {place} holds files of several splits: {', '.join(splits.values())}; name the one that is meant, "
            "or list the files if all are"
        )


def _splits_of(files: Sequence[DataFile], name_of: Callable[[Path], str]) -> dict[str, str]:
    """Return the splits that names show, each with its first file."""
    splits: dict[str, str] = {}
    for file in files:
        if match := SPLIT_NAME.search(name_of(file.path)):
            splits.setdefault(SPLITS[match.group().lower()], file.path.name)
    return splits


def _refuse_several_kinds(files: Sequence[DataFile], folder: Path, key: str) -> None:
    """Refuse to guess which files of a folder are data: a licence in .txt is not, a table in .csv may be."""
    kinds = {file.kind: file.path.name for file in reversed(files)}
    if len(kinds) > 1:
        likely = next(kind for kind in kinds if kind != "txt")
        raise DataError(
            f"{key}: folder {folder} holds files of several kinds: {', '.join(sorted(kinds.values()))}; name the files "
            f"that are meant, or a pattern such as {folder}/*.{likely}"
        )


def _files_of_saved(source: Source, folder: Path, key: str) -> list[DataFile]:
    """Return the files of a folder that `save_to_disk` wrote, in the order in which it lists them."""
    _refuse_hub_settings(source, ("subset", "revision"), key)
    if (folder / SAVED_DICT).is_file():
        splits = _listed(folder / SAVED_DICT, "splits", key)
        if source.split not in splits:
            raise DataError(
                f"{key}: {folder} has no split {source.split}; found {', '.join(map(str, splits)) or 'none'}; set split "
                "to the one that is meant"
            )
        folder /= source.split
    else:
        _refuse_hub_settings(source, ("split",), key)
    entries = _listed(folder / SAVED_DATASET, "_data_files", key)
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    files = [DataFile(folder / name, str(folder / name), "arrow") for name in names if isinstance(name, str)]
    if len(files) < len(names):
        raise DataError(
            f"{folder / SAVED_DATASET}: found a data file without a name; expected what save_to_disk writes"
        )
    for file in files:
        if not file.path.is_file():
            raise DataError(
                f"{key}: {file.path} does not exist, but {folder / SAVED_DATASET} lists it; copy the folder again"
            )
    return files


def _listed(path: Path, field: str, key: str) -> list[object]:
    """Return a list in a JSON file of `save_to_disk`."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))[field]
    except FileNotFoundError:
        raise DataError(
            f"{key}: {path} does not exist; expected what save_to_disk writes: copy the folder again"
        ) from None
    except (ValueError, KeyError, TypeError):
        listed = None
    if not isinstance(listed, list):
        raise DataError(f"{path}: found no list {field}; expected what save_to_disk writes: copy the folder again")
    return listed
