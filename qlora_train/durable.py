"""The only place that writes files which must survive a crash.

Nothing is written in place. A folder is filled under a temporary name beside its destination, every file is flushed to
the disk, a manifest with the sha256 of each file is written last, and one rename makes the whole appear. A folder without
a manifest that verifies does not count as written.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"
_BLOCK_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a small file by new content, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def write_manifest(folder: Path) -> None:
    """Flush every file of a folder and write the manifest that vouches for them."""
    entries = {}
    for path in _files(folder):
        _flush(path)
        entries[path.relative_to(folder).as_posix()] = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
    write_text(folder / MANIFEST, json.dumps({"files": entries}, indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """Return what is wrong with a folder written by `staged_folder`, or None when every file is as it was written."""
    try:
        entries = _read_manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    for name, (sha256, size_bytes) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != size_bytes:
            return f"{name} has {size} bytes instead of {size_bytes}"
        if sha256_of(path) != sha256:
            return f"{name} has changed since it was written (sha256 differs)"
    return None


def _read_manifest(folder: Path) -> dict[str, tuple[str, int]]:
    """Return sha256 and size in bytes by file; raises whatever a content of any other shape gives."""
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: (str(entry["sha256"]), int(entry["size_bytes"])) for name, entry in files.items()}


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final`; on success flush it, write its manifest and rename it to `final`.

    A previous folder of that name is replaced only after the new one is whole. On an exception the staging folder is
    removed and `final` is as it was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.with_name(f".{final.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        write_manifest(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _replace_folder(staging, final)


def _replace_folder(staging: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)
