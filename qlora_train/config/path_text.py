"""What a text must be to name something on a disk, checked before any disk is asked."""

import re

LONGEST_NAME_BYTES = 255
"""Longest name of a file or folder that file systems take."""
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{2,}")


def checked_path(value: str | None) -> str | None:
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


def checked_source(value: str) -> str:
    """Return the path of a data set as it is, when it is no URL.

    Raises:
        ValueError: it is one, or no path.
    """
    if match := URL.match(value):
        raise ValueError(
            f"a URL ({match.group()}...) is not read; allowed: a local file, folder or pattern, or the Hub id of a data "
            "set such as owner/name; fetch the file first and give its path"
        )
    checked_path(value)
    return value
