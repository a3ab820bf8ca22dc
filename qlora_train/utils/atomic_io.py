"""The only place that writes and deletes files which must survive a crash.

Nothing is written in place. A folder is filled under a temporary name beside its destination, every file is flushed to
the disk, a manifest with the sha256 of each file is written last, and one rename makes the whole appear. A folder without
a manifest that verifies does not count as written. Deletion begins with a rename too, so that nothing half deleted is ever
taken for something damaged.

What a killed process left behind (``.NAME.staging``, ``.NAME.old``, ``.NAME.deleted``) is removed by
`remove_stale_files`; a folder that was being replaced is restored if its successor is not complete.

Every change is a numbered point of `faults`, so that tests can let each of them fail.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_train.utils.fault_injection import changing, writing

MANIFEST = "manifest.json"
STAGING, OLD, DELETED, TEMPORARY = ".staging", ".old", ".deleted", ".tmp"
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


# --- files ------------------------------------------------------------------------------------------------------------


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make one file of a folder that is being staged; the manifest flushes it later."""
    with writing(path):
        write(path)


def write_text(path: Path, text: str) -> None:
    """Replace a small file by new content, whole or not at all."""
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
    """Add a line to a log of lines; a crash can leave its last line torn, which readers must bear."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


# --- whole folders ----------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Flush every file of a folder and write the manifest that vouches for them.

    Args:
        folder: its files, in folders of its own as well.
        metadata: what the folder is, as JSON values; `read_metadata` of the folder reads it back.
    """
    entries = {}
    for path in _files(folder):
        with writing(path):
            _flush(path)
        entries[path.relative_to(folder).as_posix()] = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
    write_text(folder / MANIFEST, _render({"metadata": dict(metadata or {}), "files": entries}))
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        _flush(inner)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return what the manifest of a folder says of it, empty when there is no manifest that can be read."""
    try:
        return dict(_read_manifest(folder)["metadata"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def verify_manifest(folder: Path) -> str | None:
    """Return what is wrong with a folder written by `atomic_folder`, or None when every file is as it was written."""
    try:
        files = _read_manifest(folder)["files"]
        wanted = {name: (str(entry["sha256"]), int(entry["size_bytes"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    for name, (sha256, size_bytes) in wanted.items():
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
    """Yield an empty folder beside `final`; on success flush it, write its manifest and rename it to `final`.

    A previous folder of that name is replaced only after the new one is whole. On an exception the staging folder is
    removed and `final` is as it was.

    Args:
        final: the destination.
        metadata: what the folder is, for its manifest.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = _beside(final, STAGING)
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
    remove_folder(_beside(final, OLD))


def remove_folder(folder: Path) -> None:
    """Delete a folder: it is gone at once under its name, however long its files take; one that is absent may be so."""
    if not folder.exists() and not folder.is_symlink():
        return
    deleted = _beside(folder, DELETED)
    shutil.rmtree(deleted, ignore_errors=True)
    with changing(folder):
        folder.rename(deleted)
    with changing(deleted):
        shutil.rmtree(deleted, ignore_errors=True)


def is_stale(name: str) -> bool:
    """Say whether a file or folder of this name is something that was being written, replaced or deleted."""
    return name.startswith(".") and name.endswith((STAGING, OLD, DELETED, TEMPORARY))


def remove_stale_files(folder: Path) -> None:
    """Clear what a killed process left half done inside a folder that this process owns."""
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
    old = _beside(final, OLD)
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


def _beside(folder: Path, suffix: str) -> Path:
    """Return the name of a helper of `folder`; a leading dot that is there already is not doubled."""
    return folder.with_name(f".{folder.name.removeprefix('.')}{suffix}")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _render(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest; raises ValueError, or whatever a content of any other shape gives, when it is not as written."""
    content = (folder / MANIFEST).read_bytes()
    manifest: dict[str, Any] = json.loads(content)
    if _render(manifest).encode() != content:
        raise ValueError("not as it was written")
    return manifest
