"""LLaMA-Factory's `dataset_info.json`, which says what the names in `dataset` are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_train.config.other_trainers.key_mapping import Convert, Found, Settings
from qlora_train.config.other_trainers.value_conversions import names

FILE = "dataset_info.json"
MAX_BYTES = 5_000_000
ALPACA = {"instruction": ("prompt", "instruction"), "input": ("query", "input"), "output": ("response", "output")}
PAIR = {
    "question": ("prompt", "instruction"), "input": ("query", "input"),
    "chosen": ("chosen", "chosen"), "rejected": ("rejected", "rejected"),
}  # fmt: skip
"""Column here -> its name in an entry's `columns`, and the column of the file if an entry has no `columns`."""
PASSED_ON = ("system", "tools", "history")


def data_sets(setting: str) -> Convert:
    """Return the conversion of a list of names to the sources of `setting`."""

    def convert(found: Found) -> Settings:
        folder = Path(str(found.config.get("dataset_dir") or "data"))
        info = _read(folder / FILE)
        is_text = str(found.config.get("stage", "")).lower() == "pt"
        sources, notes = [], []
        for name in names(found.value):
            entry = info.get(name)
            if isinstance(entry, dict):
                sources.append(_source(entry, folder, is_text=is_text))
                notes += _not_carried(name, entry)
            else:
                sources.append({"path": name})
                notes += [f"{name} is defined in {folder / FILE}, which was not found: give its path"] * (
                    "/" not in name
                )
        todo = any("not found" in note for note in notes)
        return Settings({setting: sources}, "; ".join(notes), todo=todo)

    return convert


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) else {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _source(entry: Mapping[str, Any], folder: Path, *, is_text: bool) -> dict[str, Any]:
    """Return an entry as a source of ours."""
    hub_id = entry.get("hf_hub_url") or entry.get("ms_hub_url") or entry.get("om_hub_url")
    source = {
        "path": str(hub_id or folder / str(entry.get("file_name", ""))),
        "subset": entry.get("subset"), "split": entry.get("split"), "num_rows": entry.get("num_samples"),
    } | _layout(entry, is_text=is_text)  # fmt: skip
    return {key: value for key, value in source.items() if value}


def _layout(entry: Mapping[str, Any], *, is_text: bool) -> dict[str, Any]:
    """Return the format and the renamed columns."""
    given = _mapping(entry.get("columns"))
    if entry.get("formatting") in ("sharegpt", "openai"):
        return _chat_layout(entry, given)
    if is_text:
        wanted = {"text": ("prompt", "instruction")}
        name = "text"
    else:
        wanted, name = (PAIR, "question_preference") if entry.get("ranking") else (ALPACA, "alpaca")
    columns = {ours: given.get(theirs, default) if not given else given.get(theirs)
               for ours, (theirs, default) in wanted.items()}  # fmt: skip
    columns |= {key: given[key] for key in PASSED_ON if key in given}
    return {"format": name, "columns": {ours: theirs for ours, theirs in columns.items() if theirs and ours != theirs}}


def _chat_layout(entry: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    turns = given.get("messages", "conversations")
    if entry.get("ranking"):
        name, columns = (
            "preference",
            {"prompt": turns, "chosen": given.get("chosen"), "rejected": given.get("rejected")},
        )
    elif "kto_tag" in given:
        name, columns = "unpaired_messages", {"messages": turns, "label": given["kto_tag"]}
    else:
        tags = _mapping(entry.get("tags"))
        is_openai = entry.get("formatting") == "openai" or tags.get("content_tag") == "content"
        name = "messages" if is_openai else "conversations"
        columns = {name: turns}
    columns |= {key: given.get(key) for key in PASSED_ON}
    return {"format": name, "columns": {ours: theirs for ours, theirs in columns.items() if theirs and ours != theirs}}


def _not_carried(name: str, entry: Mapping[str, Any]) -> list[str]:
    given = _mapping(entry.get("columns"))
    notes = [
        f"{name}: column {given[key]} ({key}) is not read" for key in ("images", "videos", "audios") if key in given
    ]
    if "kto_tag" in given and entry.get("formatting") not in ("sharegpt", "openai"):
        notes.append(
            f"{name}: {given['kto_tag']} is read beside a list of turns; write messages for train.objective: kto"
        )
    if "script_url" in entry or "cloud_file_name" in entry:
        notes.append(f"{name}: its rows were not found: no code or cloud storage is read; give a file")
    return notes
