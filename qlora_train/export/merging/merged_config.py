"""config.json of a merged model: the base's own with what the merge changed.

Transformers would write all of it by its newest names for settings, and older readers take a default in silence for what
they do not find. The base's file keeps its names, and one that has new names alone gets the old ones too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_train.architectures.multimodal import TEXT_CONFIG
from qlora_train.export.merging.legacy_config import with_old_names
from qlora_train.utils.errors import MergeError

CONFIG = "config.json"
_ROPE = "rope_parameters"
_NOT_OF_THE_MODEL = ("_name_or_path", "quantization_config", "torch_dtype", "transformers_version", "type")


def write_config(folder: Path, base_folder: Path, config: Any) -> None:
    """Write config.json of a merged model.

    Args:
        folder: the merged model.
        base_folder: gives the file that is changed.
        config: Transformers config of what was merged.

    Raises:
        MergeError: Transformers would read the file otherwise than `config`.
    """
    content = json.loads((base_folder / CONFIG).read_text(encoding="utf-8"))
    content.pop("quantization_config", None)
    merged = _as_read(config)
    content = _with_changes(content, _as_read(_parsed(content, config)), merged)
    for part in (content, content.get(TEXT_CONFIG)):
        if isinstance(part, dict):  # the default differs by class and version
            part["tie_word_embeddings"] = config.tie_word_embeddings
    content = with_old_names(content)
    written = _as_read(_parsed(content, config))
    wrong = sorted(key for key in merged if merged[key] != written.get(key))  # `written` has the old names besides
    if wrong:
        raise MergeError(
            f"{base_folder / CONFIG}: {wrong[0]} is {merged[wrong[0]]!r} in the model that was merged and would be read "
            f"as {written.get(wrong[0])!r}; load the base with transformers, save_pretrained it to a new folder and merge "
            "onto that"
        )
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _parsed(content: Mapping[str, Any], config: Any) -> Any:
    """Return the Transformers config that a config.json is read as."""
    return type(config).from_dict(json.loads(json.dumps(content), object_hook=_with_float))


def _with_float(value: dict[str, Any]) -> Any:
    """Read infinity as Transformers writes it: JSON has no such number."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _as_read(config: Any) -> dict[str, Any]:
    """Return the settings of a Transformers config that say what the model is."""
    plain: dict[str, Any] = json.loads(json.dumps(_without_names(config.to_dict()), default=str))
    return plain


def _without_names(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_names(inner) for key, inner in value.items() if key not in _NOT_OF_THE_MODEL}
    return value


def _with_changes(content: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with the settings that differ, each in the part that it is in."""
    changed = dict(content)
    for key, value in after.items():
        old = before.get(key)
        overruled = key == _ROPE and key in content and _without_names(content[key]) != value  # by an old name there
        if value == old and not overruled:
            continue
        if not key.endswith("_config") or not isinstance(old, Mapping):
            changed[key] = value
        elif isinstance(content.get(key), Mapping):
            changed[key] = _with_changes(content[key], old, value)
        else:  # the settings of this part are among those of the whole, as in older files
            changed = _with_changes(changed, old, value)
    return changed
