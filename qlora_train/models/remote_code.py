"""Python code shipped with a checkpoint: it runs only if the config trusts it and can pin it.

Transformers runs such code if `auto_map` names it and `trust_remote_code` is true. An entry ``owner/other--file.Class``
names code of a second repository, which `model.revision` does not pin: it is refused.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_train.utils.errors import ModelError

logger = logging.getLogger(__name__)

FILES = ("config.json", "tokenizer_config.json")
"""Files whose `auto_map` Transformers uses for a language model."""


def check_trusted_code(folder: Path, name: str, revision: str | None) -> None:
    """Warn which code of a trusted base will run.

    Args:
        folder: the base on disk.
        name: of the base, for messages.
        revision: its commit; None for local files.

    Raises:
        ModelError: `auto_map` names code of another repository.
    """
    foreign = [entry for file in FILES for entry in _auto_map(folder / file) if "--" in entry]
    if foreign:
        raise ModelError(
            f"model.trust_remote_code: {name} runs code of another repository ({foreign[0]!r} in auto_map), which "
            "model.revision does not pin; copy that code into a local folder with the model, or use another model"
        )
    files = ", ".join(sorted(file.name for file in folder.glob("*.py"))) or "none"
    version = f"at {revision}" if revision else "from a local folder"
    logger.warning("model.trust_remote_code: runs the Python code of %s %s: %s", name, version, files)


def _auto_map(file: Path) -> Iterator[str]:
    """Yield the entries of `auto_map` in a JSON file; unreadable files are reported elsewhere."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    auto_map = content.get("auto_map") if isinstance(content, dict) else None
    for value in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        yield from (entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str))
