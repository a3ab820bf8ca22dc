"""Write config.json of a merged model: the base's own file with the settings that the merge changed.

Transformers would write only its newest names for settings, for which older readers silently use defaults. The base's file
keeps its names, and a file with new names only gets the old ones too.
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
    """Write config.json of the merged model in `folder`, from the base's file and the Transformers config of the model.

    Raises:
        MergeError: Transformers would not read the file as `config`.
    """
    content = json.loads((base_folder / CONFIG).read_text(encoding="utf-8"))
    content.pop("quantization_config", None)
    merged = _to_json(config)
    content = _with_changes(content, _to_json(_parse(content, config)), merged)
    for part in (content, content.get(TEXT_CONFIG)):
        if isinstance(part, dict):  # the default differs by class and version
            part["tie_word_embeddings"] = config.tie_word_embeddings
    content = with_old_names(content)
    written = _to_json(_parse(content, config))
    wrong = sorted(key for key in merged if merged[key] != written.get(key))  # `written` also has the old names
    if wrong:
        raise MergeError(
            f"{base_folder / CONFIG}: {wrong[0]} is {merged[wrong[0]]!r} in the merged model and would be read as "
            f"{written.get(wrong[0])!r}; load the base with transformers, save_pretrained it to a new folder and merge "
            "onto that"
        )
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _parse(content: Mapping[str, Any], config: Any) -> Any:
    return type(config).from_dict(json.loads(json.dumps(content), object_hook=_read_float))


def _read_float(value: dict[str, Any]) -> Any:
    """Read infinity as Transformers writes it; JSON has no such number."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _to_json(config: Any) -> dict[str, Any]:
    """Return the settings of a Transformers config that describe the model."""
    plain: dict[str, Any] = json.loads(json.dumps(_of_the_model(config.to_dict()), default=str))
    return plain


def _of_the_model(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _of_the_model(inner) for key, inner in value.items() if key not in _NOT_OF_THE_MODEL}
    return value


def _with_changes(content: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with the settings that differ, each in its own section."""
    changed = dict(content)
    for key, value in after.items():
        old = before.get(key)
        overruled = key == _ROPE and key in content and _of_the_model(content[key]) != value  # by an old name there
        if value == old and not overruled:
            continue
        if not key.endswith("_config") or not isinstance(old, Mapping):
            changed[key] = value
        elif isinstance(content.get(key), Mapping):
            changed[key] = _with_changes(content[key], old, value)
        else:  # older files have the settings of this section at the top level
            changed = _with_changes(changed, old, value)
    return changed
