"""What a text must be to name something on a disk, and whether it names a local file or something on the Hub."""

import glob
import re
from pathlib import Path

LONGEST_NAME_BYTES = 255
"""Longest name of a file or folder that file systems take."""
TEXT_KINDS = ("jsonl", "json", "csv", "tsv", "txt")
KINDS = (*TEXT_KINDS, "parquet", "arrow")
COMPRESSIONS = ("gz", "zst")
ALIASES = {"ndjson": "jsonl"}
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{2,}")


def validate_path(value: str | None) -> str | None:
    """Return a path as it is, when a file system could hold it.

    Raises:
        ValueError: it holds a NUL byte or a line break, or a name in it is too long.
    """
    if value is None:
        return None
    if "\n" in value:
        raise ValueError(
            "holds a line break; allowed: a path in one line (several data files are a list: [a.jsonl, b.jsonl])"
        )
    if "\0" in value:
        raise ValueError("holds a NUL byte, which no path can; allowed: a path without one")
    longest = max((len(name.encode(errors="surrogatepass")) for name in value.split("/")), default=0)
    if longest > LONGEST_NAME_BYTES:
        raise ValueError(
            f"a name of {longest} bytes in it is too long for a file system; allowed: at most {LONGEST_NAME_BYTES} bytes "
            "between two slashes"
        )
    return value


def validate_source(value: str) -> str:
    """Return the path of a data set as it is, when it is no URL.

    Raises:
        ValueError: it is one, or no path.
    """
    if match := URL.match(value):
        raise ValueError(
            f"a URL ({match.group()}...) is not read; allowed: a local file, folder or pattern, or the Hub id of a data "
            "set such as owner/name; fetch the file first and give its path"
        )
    validate_path(value)
    return value


def data_file_type(path: Path) -> tuple[str, str] | None:
    """Return what the suffixes of a data file say, (kind, compression), or None where they are not known."""
    words = [ALIASES.get(word, word) for word in path.name.lower().split(".")[1:]]
    if words and words[-1] in KINDS:
        return words[-1], ""
    if len(words) > 1 and words[-1] in COMPRESSIONS and words[-2] in TEXT_KINDS:
        return words[-2], words[-1]
    return None


def is_local_data(text: str) -> bool:
    """Say whether a data source is local: it exists, or is written as no Hub id is."""
    path = Path(text).expanduser()
    return path.exists() or glob.has_magic(text) or data_file_type(path) is not None or _is_written_as_path(text)


def is_local_model(text: str) -> bool:
    """Say whether `model.model_name_or_path` is local: it exists, or is written as no Hub id is."""
    path = Path(text).expanduser()
    return path.exists() or path.suffix == ".gguf" or _is_written_as_path(text)


def _is_written_as_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/")
