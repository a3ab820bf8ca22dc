"""Checks of paths, and whether a name is a local path or a Hub id."""

import glob
import re
from pathlib import Path

MAX_NAME_BYTES = 255
"""Limit of file systems for one name in a path."""
TEXT_KINDS = ("jsonl", "json", "csv", "tsv", "txt")
KINDS = (*TEXT_KINDS, "parquet", "arrow")
COMPRESSIONS = ("gz", "zst")
ALIASES = {"ndjson": "jsonl"}
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{2,}")


def validate_path(value: str | None) -> str | None:
    """Return a valid path unchanged.

    Raises:
        ValueError: it has a NUL byte, a line break, or a name that is too long.
    """
    if value is None:
        return None
    if "\n" in value:
        raise ValueError(
            "holds a line break; allowed: a path in one line (several data files are a list: [a.jsonl, b.jsonl])"
        )
    if "\0" in value:
        raise ValueError("holds a NUL byte; allowed: a path without one")
    longest = max((len(name.encode(errors="surrogatepass")) for name in value.split("/")), default=0)
    if longest > MAX_NAME_BYTES:
        raise ValueError(
            f"a name of {longest} bytes in it is too long for a file system; allowed: at most {MAX_NAME_BYTES} bytes "
            "between two slashes"
        )
    return value


def validate_source(value: str) -> str:
    """Return a data source's path unchanged.

    Raises:
        ValueError: it is a URL or not a valid path.
    """
    if match := URL.match(value):
        raise ValueError(
            f"a URL ({match.group()}...) is not read; allowed: a local file, folder or pattern, or the Hub id of a data "
            "set such as owner/name; fetch the file first and give its path"
        )
    validate_path(value)
    return value


def data_file_type(path: Path) -> tuple[str, str] | None:
    """Return (type, compression) by the suffixes of a data file, or None if they are unknown."""
    words = [ALIASES.get(word, word) for word in path.name.lower().split(".")[1:]]
    if words and words[-1] in KINDS:
        return words[-1], ""
    if len(words) > 1 and words[-1] in COMPRESSIONS and words[-2] in TEXT_KINDS:
        return words[-2], words[-1]
    return None


def is_local_data(text: str) -> bool:
    """Tell whether a data source is local: it exists, or cannot be a Hub id."""
    path = Path(text).expanduser()
    return path.exists() or glob.has_magic(text) or data_file_type(path) is not None or _is_written_as_path(text)


def is_local_model(text: str) -> bool:
    """Tell whether `model.model_name_or_path` is local: it exists, or cannot be a Hub id."""
    path = Path(text).expanduser()
    return path.exists() or path.suffix == ".gguf" or _is_written_as_path(text)


def _is_written_as_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/")
