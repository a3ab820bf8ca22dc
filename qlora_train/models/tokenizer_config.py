"""tokenizer_config.json that Transformers 4 reads as Transformers 5 does."""

import json
from pathlib import Path

TOKENIZER_CONFIG = "tokenizer_config.json"
_OLD_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Transformers 5 takes both names for the same class."""


def use_old_names(folder: Path) -> None:
    """Give the settings in a tokenizer's folder, if any, the names that both versions of Transformers know."""
    file = folder / TOKENIZER_CONFIG
    if not file.is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    name = content.get("tokenizer_class")
    if name in _OLD_CLASSES:
        content["tokenizer_class"] = _OLD_CLASSES[name]
    if isinstance(content.get("extra_special_tokens"), list):  # Transformers 4 fails on a list
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
