"""Check that the disk has room for the files of an export before the first one is written."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from qlora_train.utils.errors import ExportError


def check_export_space(folder: Path, sizes: Mapping[str, int]) -> None:
    """Raise an ExportError if files of these sizes, by name, do not fit on the disk of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if needed <= free:
        return
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in sizes.items())
    raise ExportError(
        f"export: needs up to {_gigabytes(needed)} on the disk of {folder} ({parts}) and {math.floor(free / 1e8) / 10:.1f} "
        "GB are free; make room, or export fewer number formats at once"
    )


def _gigabytes(size_bytes: int) -> str:
    return f"{math.ceil(size_bytes / 1e8) / 10:.1f} GB"
