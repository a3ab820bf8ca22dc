"""Writes and deletes files that must survive a crash; nothing else in the package does.

A folder is filled under a temporary name, every file is flushed, a manifest with the sha256 of each file is written last,
and one rename publishes it. Deletion starts with a rename, so that a half-deleted folder never looks damaged. A killed
process leaves ``.NAME.staging``, ``.NAME.old`` or ``.NAME.deleted``; `remove_stale_files` removes these.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STAGING, OLD, DELETED, TEMPORARY = ".staging", ".old", ".deleted", ".tmp"

writing: Callable[[Path], AbstractContextManager[Any]] = nullcontext
"""Around each write of a file; tests replace it to make writes fail."""
changing: Callable[[Path], AbstractContextManager[Any]] = nullcontext
"""The same around each rename, new folder and deletion."""


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` to create a file inside an `atomic_folder`, which flushes it later."""
    with writing(path):
        write(path)


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with writing(temporary), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with changing(path):
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line to a log; after a crash the last line may be incomplete."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_manifest(folder: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Flush all files below a folder and write their manifest, with `metadata` as JSON values."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        with writing(path):
            _flush(path)
        entries[path.relative_to(folder).as_posix()] = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
    write_text(folder / MANIFEST, _to_json({"metadata": dict(metadata or {}), "files": entries}))
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        _flush(inner)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata in a folder's manifest, empty if there is no readable manifest."""
    try:
        return dict(_read_manifest(folder)["metadata"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def verify_manifest(folder: Path) -> str | None:
    """Return what differs from a folder's manifest, or None."""
    try:
        files = _read_manifest(folder)["files"]
        expected = {name: (str(entry["sha256"]), int(entry["size_bytes"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    for name, (sha256, size_bytes) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != size_bytes:
            return f"{name} has {size} bytes instead of {size_bytes}"
        if sha256_of(path) != sha256:
            return f"{name} has changed since it was written (sha256 differs)"
    return None


@contextmanager
def atomic_folder(final: Path, metadata: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Yield an empty folder; on success write its manifest and rename it to `final`, replacing a previous one.

    On an exception the new folder is removed and `final` is unchanged.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = _hidden(final, STAGING)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with changing(staging):
            staging.mkdir()
        yield staging
        write_manifest(staging, metadata)
        _replace_folder(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    remove_folder(_hidden(final, OLD))


def remove_folder(folder: Path) -> None:
    """Delete a folder atomically (rename, then remove). Missing folders are ignored."""
    if not folder.exists() and not folder.is_symlink():
        return
    deleted = _hidden(folder, DELETED)
    shutil.rmtree(deleted, ignore_errors=True)
    with changing(folder):
        folder.rename(deleted)
    with changing(deleted):
        shutil.rmtree(deleted, ignore_errors=True)


def is_stale(name: str) -> bool:
    """Tell whether a name is that of an unfinished write, replacement or deletion."""
    return name.startswith(".") and name.endswith((STAGING, OLD, DELETED, TEMPORARY))


def remove_stale_files(folder: Path) -> None:
    """Remove what a killed process left; restore a folder whose replacement is missing."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in (item for item in found if is_stale(item.name)):
        replaced = path.with_name(path.name.removeprefix(".").removesuffix(OLD))
        if path.name.endswith(OLD) and not replaced.exists():
            path.rename(replaced)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _replace_folder(staging: Path, final: Path) -> None:
    old = _hidden(final, OLD)
    shutil.rmtree(old, ignore_errors=True)
    replaces = final.exists()
    if replaces:
        with changing(old):
            final.rename(old)
    try:
        with changing(final):
            staging.rename(final)
    except BaseException:
        if replaces and not final.exists():
            old.rename(final)
        raise
    _flush(final.parent)


def _hidden(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name.removeprefix('.')}{suffix}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _read_manifest(folder: Path) -> dict[str, Any]:
    content = (folder / MANIFEST).read_bytes()
    manifest: dict[str, Any] = json.loads(content)
    if _to_json(manifest).encode() != content:
        raise ValueError("changed since it was written")
    return manifest
