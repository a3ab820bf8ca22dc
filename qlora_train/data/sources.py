"""Where the rows of a source lie: a local file, a glob, a folder, or a data set on the Hub.

A path that names a file (a known suffix, a glob, a leading ``./``, ``../``, ``/`` or ``~``, or something that exists)
is never looked for on the Hub, so that a typing error is answered at once with the nearest name.
"""

import difflib
import glob
import logging
import re
from pathlib import Path

from qlora_train.config.schema import Source
from qlora_train.errors import DataError

log = logging.getLogger("qlora_train")

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SUFFIX_LIST = ", ".join(SUFFIXES)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_SETTINGS = {"split": "train", "subset": None, "revision": None}
"""Settings of a source that mean something on the Hub only, and their defaults."""


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
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file())
    files = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
    if not files:
        found = ", ".join(entry.name for entry in entries[:5]) or "no files"
        raise DataError(f"{key}: folder {folder} holds no data file: found {found}; expected {SUFFIX_LIST}")
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
    return [_known(file, key) for file in files]


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; its folder {path.parent} does not exist either"
    names = [entry.name for entry in path.parent.iterdir()]
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / nearest[0]}?" if nearest else f"; the folder is {path.parent.resolve()}"
