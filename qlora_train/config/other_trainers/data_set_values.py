"""Conversions of the keys that name the files of a data set, as `datasets.load_dataset` takes them."""

from pathlib import Path
from typing import Any

from qlora_train.config.other_trainers.key_mapping import Convert, Found, Lost, Settings, Unneeded
from qlora_train.config.other_trainers.value_conversions import names
from qlora_train.config.path_checks import MAX_NAME_BYTES

LOADERS = ("json", "csv", "parquet", "arrow", "text")
"""Words that name a kind of file instead of a data set."""


def split(found: Found) -> Any:
    """Return a split without a slice, which is not read."""
    name, bracket, part = str(found.value).partition("[")
    if not bracket:
        return name
    return Settings({"[].split": name}, f"all of {name}, without the slice [{part}: num_rows takes an exact number")


def path_or_loader(files_key: str = "data_files") -> Convert:
    """Convert a path, Hub id, or a word for the kind of the files that another key names."""

    def convert(found: Found) -> Any:
        if str(found.value) in LOADERS and files_key in found.beside:
            return Unneeded(f"{files_key} names the files")
        return found.value

    return convert


def data_files(path_key: str) -> Convert:
    """Convert file names: alone, or inside the folder that `path_key` names."""

    def convert(found: Found) -> Any:
        files, path = names(found.value), str(found.beside.get(path_key, ""))
        if path in (*LOADERS, ""):
            return files
        if len(path) < MAX_NAME_BYTES and Path(path).is_dir():
            return [str(Path(path) / name) for name in files]
        return Lost("one file of a data set on the Hub cannot be named; fetch it and give its path", todo=True)

    return convert
