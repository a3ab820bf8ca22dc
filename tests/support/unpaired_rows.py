"""Answers with labels, of ragged length, for tests."""

import json
from pathlib import Path
from typing import Any

from tests.support.preference_pairs import sums


def labelled(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return a right or a wrong sum of each prompt, two of three right."""
    return [
        {
            "prompt": row["prompt"],
            "completion": row["rejected" if index % 3 == 1 else "chosen"],
            "label": index % 3 != 1,
        }
        for index, row in enumerate(sums(count, seed))
    ]


def write_labelled(path: Path, *, count: int = 24, seed: int = 0) -> Path:
    """Write them as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled(count, seed)), encoding="utf-8")
    return path
