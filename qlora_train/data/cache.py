"""Stores of tokenised data, kept for the next run: found again by what they were made of, and by nothing else.

The key is a sha256 of the bytes of the files, the tokenizer with its chat template, and those data settings that decide
tokens and masks; paths, model weights and training settings have no part in it. Stores are written durably, verified
before they are used, and the least recently used ones make room when the folder grows beyond its limit.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_train import durable
from qlora_train.errors import DataError, first_line

log = logging.getLogger("qlora_train")

LAYOUT = 1
"""Counts up whenever stores or the rules for making them change."""
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

    def get(self, key: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
        """Return the folder of a store, and whether it was there.

        Args:
            key: from `key_of`.
            make: writes a store into an empty folder.

        Raises:
            DataError: the folder cannot be written, or is full; and whatever `make` raises.
        """
        final = self.folder / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(key):
                problem = durable.damage(final) if final.exists() else "absent"
                if problem not in (None, "absent"):
                    log.warning("%s: tokenised data is damaged (%s) and is made again", final, problem)
                if problem is not None:
                    with durable.staged_folder(final) as staging:
                        make(staging)
                os.utime(final)
                self._make_room(final)
        except OSError as error:
            raise DataError(
                f"data.cache_dir: {self.folder}: tokenised data cannot be kept there: "
                f"{error.strerror or first_line(error)}; "
                "make room, or set data.cache_dir to another folder"
            ) from None
        return final, problem is None

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Let one process at a time make a store; another one that wants the same waits and then finds it."""
        with (self.folder / f".{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, used: Path) -> None:
        """Delete the stores that were not used for longest; `used` stays, and open ones stay readable."""
        stores = sorted(
            (path for path in self.folder.iterdir() if _is_store(path)), key=lambda path: path.stat().st_mtime
        )
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in stores}
        excess = sum(sizes.values()) - self._limit_bytes
        for path in stores:
            if excess <= 0:
                return
            if path == used:
                continue
            shutil.rmtree(path, ignore_errors=True)
            excess -= sizes[path]
            log.info("%s: deleted to keep the cache below data.cache_limit (%s)", path, self._limit)


def _is_store(path: Path) -> bool:
    return path.is_dir() and len(path.name) == 64 and (path / durable.MANIFEST).is_file()


def key_of(files: Sequence[Path], decisive: Mapping[str, Any]) -> str:
    """Return the key of a store: a hash of the files' content, in order, and of everything else that is `decisive`."""
    content = [durable.sha256_of(path) for path in files]
    text = json.dumps({"layout": LAYOUT, "content": content, "decisive": decisive}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
