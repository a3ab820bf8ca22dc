"""Python code that a checkpoint brings along: run when the config says so, and only code that the config can pin.

Transformers runs such code when `auto_map` names it and `trust_remote_code` is true. An entry ``owner/other--file.Class``
names code of a second repository, which `model.revision` says nothing about: it is refused.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_train.utils.errors import ModelError

logger = logging.getLogger(__name__)

FILES = ("config.json", "tokenizer_config.json")
"""Files whose `auto_map` Transformers follows for a language model."""


def check_trusted_code(folder: Path, name: str, revision: str | None) -> None:
    """Say which code of a trusted base will be run, and refuse code of another repository.

    Args:
        folder: the base on disk.
        name: what people call it.
        revision: the commit that it is at; None for local files.

    Raises:
        ModelError: `auto_map` names code of another repository.
    """
    foreign = [entry for file in FILES for entry in _entries(folder / file) if "--" in entry]
    if foreign:
        raise ModelError(
            f"model.trust_remote_code: {name} runs code of another repository ({foreign[0]!r} in auto_map), which "
            "model.revision does not pin; copy that code into a local folder with the model, or use another model"
        )
    files = ", ".join(sorted(file.name for file in folder.glob("*.py"))) or "none"
    pinned = f"at {revision}" if revision else "as it lies on this machine"
    logger.warning("model.trust_remote_code: runs the Python code of %s %s: %s", name, pinned, files)


def untrusted_code(where: str) -> ModelError:
    """Return the error for a base that needs code of its own which the config does not trust; `where` names the base."""
    return ModelError(
        f"{where} runs Python code of its own (auto_map); if you trust it, set model.trust_remote_code: true and, "
        "for a model of the Hub, model.revision to the 40-digit commit that you have read"
    )


def _entries(file: Path) -> Iterator[str]:
    """Yield the classes that `auto_map` of a JSON file names; none where it cannot be read, which others report."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    auto_map = content.get("auto_map") if isinstance(content, dict) else None
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for value in values:
        yield from (entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str))
