"""Cached conversions of base models into folders of safetensors."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from qlora_train.utils.atomic_io import atomic_folder, verify_manifest

logger = logging.getLogger(__name__)

SHARD_BYTES = 2 * 10**9
"""Largest converted weight file, which bounds the memory of a conversion."""


def conversion_cache(kind: str) -> Path:
    """Return the user's cache folder for conversions of one kind."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "qlora-train" / kind


def convert_once(folder: Path, name: str, convert: Callable[[Path], None]) -> Path:
    """Return `folder`, written by `convert` unless it exists undamaged.

    Args:
        folder: destination; its name contains a hash of the source.
        name: of the source, for the log.
        convert: fills an empty folder.
    """
    problem = verify_manifest(folder) if folder.exists() else None
    if folder.exists() and problem is None:
        logger.info("%s: already converted, in %s", name, folder)
        return folder
    reason = f" ({problem})" if problem else ""
    logger.info("%s: converting to safetensors in %s%s", name, folder, reason)
    with atomic_folder(folder) as staging:
        convert(staging)
    return folder
