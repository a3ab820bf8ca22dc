"""The cache of tokenised data: stores by a hash of what they were made from.

The hash covers the bytes of the files, the tokenizer with its chat template, the data settings that decide tokens and
masks, and TOKENS_VERSION; not paths, model weights or training settings. Stores are written atomically and verified
before use; beyond `data.cache_limit` the least recently used ones are deleted.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qlora_train.utils import atomic_io
from qlora_train.utils.errors import DataError, first_line

log = logging.getLogger("qlora_train")

Opened = TypeVar("Opened")

TOKENS_VERSION = 5
"""Raise it when tokens, masks or the layout of a store change for the same data (tests/data/test_tokens_version.py)."""
STORE_NAME = re.compile(r"[0-9a-f]{64}")
STALE_NAME = re.compile(r"\.([0-9a-f]{64})\.(?:staging|old|deleted)")
UNITS = {"MB": 10**6, "GB": 10**9}


class StoreCache:
    """The folder of stores.

    Args:
        folder: `data.cache_dir`; None is `qlora-train` in the user's cache folder.
        limit: `data.cache_limit`.
    """

    def __init__(self, folder: str | None, limit: str) -> None:
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qlora-train"
        self.folder = (Path(folder) if folder else default).expanduser()
        self._limit = limit
        self._limit_bytes = int(limit[:-2]) * UNITS[limit[-2:]]

    def get(self, key: str, write: Callable[[Path], None], opened: Callable[[Path], Opened]) -> tuple[Opened, bool]:
        """Return a store, and whether it was cached.

        Args:
            key: from `cache_key`.
            write: writes the store into an empty folder.
            opened: opens it; an open store stays readable when another process deletes the folder.

        Raises:
            DataError: the folder cannot be written, or is full; a store cannot be read; and the errors of `write`.
        """
        final = self.folder / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(key):
                with _refuse_unreadable(final):
                    problem = atomic_io.verify_manifest(final) if final.exists() else "absent"
                if problem not in (None, "absent"):
                    log.warning("%s: cached data is damaged (%s); it is made again", final, problem)
                if problem is not None:
                    with atomic_io.atomic_folder(final) as staging:
                        write(staging)
                os.utime(final)
                with _refuse_unreadable(final):
                    store = opened(final)
                self._make_room(final)
        except OSError as error:
            raise DataError(
                f"data.cache_dir: {self.folder}: tokenised data cannot be written: {error.strerror or first_line(error)}; "
                "make room, or set data.cache_dir to another folder"
            ) from None
        return store, problem is None

    @contextlib.contextmanager
    def _locked(self, key: str, *, wait: bool = True) -> Iterator[None]:
        """Let one process at a time write, open or delete a store; without `wait`, raise BlockingIOError instead."""
        with (self.folder / f".{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield

    def _make_room(self, used: Path) -> None:
        """Delete what killed processes left, and the least recently used stores but `used`."""
        for path in self.folder.iterdir():
            match = STALE_NAME.fullmatch(path.name)
            if match and match[1] != used.name:
                with contextlib.suppress(BlockingIOError), self._locked(match[1], wait=False):
                    shutil.rmtree(path, ignore_errors=True)
        stores = [path for path in self.folder.iterdir() if STORE_NAME.fullmatch(path.name)]
        sizes = {path: _size_and_age(path) for path in stores}
        excess = sum(size for size, _ in sizes.values()) - self._limit_bytes
        for path in sorted(stores, key=lambda path: sizes[path][1]):
            if excess <= 0:
                return
            if path == used:
                continue
            with contextlib.suppress(BlockingIOError), self._locked(path.name, wait=False):
                atomic_io.remove_folder(path)
                excess -= sizes[path][0]
                log.debug("%s: deleted (cache above data.cache_limit, %s)", path, self._limit)


@contextlib.contextmanager
def _refuse_unreadable(store: Path) -> Iterator[None]:
    """Raise DataError if a store cannot be read."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {error.filename or store}: tokenised data cannot be read: "
            f"{error.strerror or first_line(error)}; make its files readable, "
            f"delete {store}, or set data.cache_dir to another folder"
        ) from None


def _size_and_age(folder: Path) -> tuple[int, float]:
    """Return the bytes of a store's files and when it was last used; zeros if another process has just deleted it."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir()), folder.stat().st_mtime
    except FileNotFoundError:
        return 0, 0.0


def cache_key(files: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """Return a hash of the files' content, in order, of TOKENS_VERSION and of the settings that decide the tokens."""
    content = [atomic_io.sha256_of(path) for path in files]
    text = json.dumps(
        {"version": TOKENS_VERSION, "content": content, "settings": settings}, sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()
