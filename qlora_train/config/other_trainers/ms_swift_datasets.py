"""ms-swift's words for data sets, such as `HF::owner/name:subset#500`, and its columns."""

import json
from typing import Any

from qlora_train.config.other_trainers.key_mapping import Convert, Found, Lost, Settings
from qlora_train.config.other_trainers.value_conversions import is_on, names

COLUMNS = {
    "query": "question", "response": "answer", "messages": "messages", "system": "system", "tools": "tools",
    "rejected_response": "rejected", "chosen_response": "chosen",
}  # fmt: skip
"""ms-swift's columns -> columns of our formats."""


def sources(setting: str) -> Convert:
    """Return the conversion of a list of data sets to the sources of `setting`."""

    def convert(found: Found) -> Settings:
        sources, notes = [], []
        for text in names(found.value):
            source, note = _source(text)
            sources.append(source)
            notes += [note] if note else []
        hub_ids = [source["path"] for source in sources if "." not in source["path"].rpartition("/")[2]]
        if hub_ids and not is_on(found.config.get("use_hf")):
            notes.append(f"{', '.join(hub_ids)}: a name on ModelScope; give its id on the Hugging Face Hub, or a file")
        return Settings({setting: sources}, "; ".join(notes), todo=any("ModelScope" in note for note in notes))

    return convert


def _source(text: str) -> tuple[dict[str, Any], str]:
    """Return `HF::id:subset#rows` as a source, and what is lost."""
    hub, separator, rest = text.partition("::")
    rest = rest if separator else text
    is_modelscope = separator and hub.lower() == "ms"
    rest, _, num_rows = rest.partition("#")
    path, _, subsets = rest.partition(":")
    source: dict[str, Any] = {"path": path}
    if subsets:
        source["subset"] = subsets.split("/")[0]
    if num_rows.isdigit():
        source["num_rows"] = int(num_rows)
    notes = [f"{path} is on ModelScope; give its id on the Hugging Face Hub, or a file"] if is_modelscope else []
    notes += [f"{path}: one source per subset; add {subsets.split('/')[1:]}"] if "/" in subsets else []
    return source, "; ".join(notes)


def columns(found: Found) -> Any:
    """Return `{file's column: ms-swift's}` as `data.columns`."""
    value = found.value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return Lost("not a mapping")
    if not isinstance(value, dict):
        return Lost("not a mapping")
    return Settings({"data.columns": {COLUMNS.get(str(theirs), str(theirs)): name for name, theirs in value.items()}},
                    "the format's name first, then the file's")  # fmt: skip
