"""Stores of tokenised data, kept for the next run: found again by what they were made of, and by nothing else.

The key is a sha256 of the bytes of the files, the tokenizer with its chat template, those data settings that decide tokens
and masks, and the code of this stage; paths, model weights and training settings have no part in it. Stores are written
durably, verified before they are used, and the least recently used ones make room when the folder grows beyond its limit.
"""

import contextlib
import fcntl
import functools
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

STORE_NAME = re.compile(r"[0-9a-f]{64}")
REMAINS_NAME = re.compile(r"\.([0-9a-f]{64})\.(?:staging|old|deleted)")
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

    def get(self, key: str, make: Callable[[Path], None], opened: Callable[[Path], Opened]) -> tuple[Opened, bool]:
        """Return a store, and whether it was there.

        Args:
            key: from `key_of`.
            make: writes a store into an empty folder.
            opened: opens it; what is open can be read on when another process deletes the folder.

        Raises:
            DataError: the folder cannot be written, or is full; and whatever `make` raises.
        """
        final = self.folder / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(key):
                problem = atomic_io.verify_manifest(final) if final.exists() else "absent"
                if problem not in (None, "absent"):
                    log.warning("%s: tokenised data is damaged (%s) and is made again", final, problem)
                if problem is not None:
                    with atomic_io.atomic_folder(final) as staging:
                        make(staging)
                os.utime(final)
                store = opened(final)
                self._make_room(final)
        except OSError as error:
            raise DataError(
                f"data.cache_dir: {self.folder}: tokenised data cannot be kept there: "
                f"{error.strerror or first_line(error)}; "
                "make room, or set data.cache_dir to another folder"
            ) from None
        return store, problem is None

    @contextlib.contextmanager
    def _locked(self, key: str, *, wait: bool = True) -> Iterator[None]:
        """Let one process at a time make, open or delete a store; without `wait`, raise BlockingIOError where one is."""
        with (self.folder / f".{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield

    def _make_room(self, used: Path) -> None:
        """Delete the stores that were not used for longest; `used` stays, and open ones stay readable."""
        self._clear_remains(used.name)
        sizes = {path: _size_bytes(path) for path in self._stores()}
        excess = sum(sizes.values()) - self._limit_bytes
        for path in sorted(sizes, key=_last_used):
            if excess <= 0:
                return
            if path == used:
                continue
            with contextlib.suppress(BlockingIOError), self._locked(path.name, wait=False):
                atomic_io.remove_folder(path)
                excess -= sizes[path]
                log.info("%s: deleted to keep the cache below data.cache_limit (%s)", path, self._limit)

    def _stores(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if STORE_NAME.fullmatch(path.name)]

    def _clear_remains(self, used: str) -> None:
        """Delete what a process that was killed left half made."""
        for path in self.folder.iterdir():
            match = REMAINS_NAME.fullmatch(path.name)
            if match and match[1] != used:
                with contextlib.suppress(BlockingIOError), self._locked(match[1], wait=False):
                    shutil.rmtree(path, ignore_errors=True)


def _size_bytes(folder: Path) -> int:
    """Return the size of a store's files; 0 where another process has just deleted it."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@functools.cache
def rules() -> str:
    """Return a hash of the code that makes tokens and masks: a store of another release is not taken for one of this."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256("".join(atomic_io.sha256_of(file) for file in files).encode()).hexdigest()


def key_of(files: Sequence[Path], decisive: Mapping[str, Any]) -> str:
    """Return the key of a store: a hash of the files' content, in order, and of everything else that is `decisive`."""
    content = [atomic_io.sha256_of(path) for path in files]
    text = json.dumps({"rules": rules(), "content": content, "decisive": decisive}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
