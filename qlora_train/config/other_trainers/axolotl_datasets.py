"""Keys of Axolotl's `datasets`, `test_datasets` and `pretraining_dataset`, and the prompt strategies they name."""

from typing import Any

from qlora_train.config.other_trainers.data_set_values import data_files, path_or_loader, split
from qlora_train.config.other_trainers.key_mapping import (
    Convert,
    Found,
    KeyMapping,
    Lost,
    Settings,
    Unneeded,
    lost,
    to,
    unneeded,
)
from qlora_train.config.other_trainers.value_conversions import is_on, names, number, only

SFT_TYPES = {
    "sharegpt": "conversations", "completion": "text", "pretrain": "text", "context_qa": "question_answer",
    "alpaca_chat.load_qa": "question_answer", "alpaca": "alpaca", "alpaca_chat": "alpaca", "alpaca_w_system": "alpaca",
    "chat_template": "messages",
}  # fmt: skip
"""`type`, or its part before the dot -> `data.train[].format`."""
PAIR_COLUMNS = {
    "intel": {"prompt": "question"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "icr": {"prompt": "input"},
    "argilla_chat": {}, "prompt_pairs": {}, "ultra": {}, "default": {},
}  # fmt: skip
"""Part of a preference `type` after the dot -> the columns that it reads under other names."""
PAIR_TEMPLATES = ("chatml", "llama3", "zephyr", "chat_template", "passthrough")


def source_keys() -> dict[str, KeyMapping]:
    """Return the rows of the keys of one data set, for each list that holds some."""
    rows: dict[str, KeyMapping] = {}
    for theirs, ours in (
        ("datasets", "data.train"),
        ("test_datasets", "data.eval"),
        ("pretraining_dataset", "data.train"),
    ):
        rows[theirs] = to(ours)
        rows |= {f"{theirs}[].{key}": row for key, row in _rows(f"{ours}[]").items()}
    return rows


def _rows(ours: str) -> dict[str, KeyMapping]:
    return {
        "path": to(f"{ours}.path", path_or_loader()),
        "data_files": to(f"{ours}.path", data_files("path")),
        "ds_type": unneeded("a file's suffix names its kind"),
        "name": to(f"{ours}.subset"),
        "split": to(f"{ours}.split", split),
        "revision": to(f"{ours}.revision"),
        "type": to(f"{ours}.format", _format),
        "weight": to(f"{ours}.weight"),
        "shards": to(f"{ours}.weight", _shards, "a sample of this share, not every n-th row"),
        "shards_idx": unneeded("weight takes a sample"),
        "field": to(f"{ours}.columns.text"),
        "text_column": to(f"{ours}.columns.text"),
        "field_messages": to(f"{ours}.columns", _messages_column),
        "message_property_mappings.role": to(f"{ours}.format", _role_name),
        "message_property_mappings.content": to(f"{ours}.format", _role_name),
        "message_field_role": to(f"{ours}.format", _role_name),
        "message_field_content": to(f"{ours}.format", _role_name),
        "message_property_mappings.*": unneeded("a message's other fields are read under their own names"),
        "field_tools": to(f"{ours}.columns.tools"),
        "field_chosen": to(f"{ours}.columns.chosen"),
        "field_rejected": to(f"{ours}.columns.rejected"),
        "type.field_system": to(f"{ours}.columns.system"),
        "type.field_instruction": to(f"{ours}.columns.instruction", _column("alpaca", "instruction")),
        "type.field_input": to(f"{ours}.columns.input", _column("alpaca", "input")),
        "type.field_output": to(f"{ours}.columns.output", _column("alpaca", "output")),
        "type.field_prompt": to(f"{ours}.columns.prompt", _column("preference", "prompt")),
        "type.field_chosen": to(f"{ours}.columns.chosen", _column("preference", "chosen")),
        "type.field_rejected": to(f"{ours}.columns.rejected", _column("preference", "rejected")),
        "type.system_prompt": lost("rows have it in a column system"),
        "type.*": lost("rows are rendered by the chat template; for other text write prompt and completion columns"),
        "roles_to_train": to(
            "data.train_on",
            lambda found: "assistant" if set(names(found.value)) <= {"assistant", "gpt"} else "all",
        ),
        "train_on_eos": unneeded("the end-of-turn token of every trained turn is trained"),
        "train_on_eot": unneeded("the end-of-turn token of every trained turn is trained"),
        "roles.*": unneeded("the usual names of the roles are recognised"),
        "message_field_training": unneeded("a turn with train: false or weight: 0 is context only"),
        "message_field_training_detail": lost("a turn is trained whole, or not at all"),
        "field_thinking": unneeded("reasoning_content, reasoning and thinking are recognised"),
        "split_thinking": unneeded("<think>...</think> at the beginning of an answer is recognised"),
        "template_thinking_key": unneeded("reasoning is passed to the template as reasoning_content"),
        "chat_template": lost("model.chat_template holds for all data sets"),
        "chat_template_jinja": lost("model.chat_template holds for all data sets"),
        "drop_system_message": lost("system turns are kept"),
        "trust_remote_code": lost("no code of a data set is run; give its files"),
        "skip": lost("data.max_rows takes a sample"),
        "conversation": unneeded("rows are rendered by the chat template"),
    }  # fmt: skip


def _column(form: str, name: str) -> Convert:
    """A `type` with columns of its own is a format of ours with renamed columns."""
    return lambda found: Settings({"[].format": form, f"[].columns.{name}": found.value})


def _shards(found: Found) -> Any:
    count = number(found.value)
    return round(1 / count, 6) if isinstance(count, int) and count > 0 else Lost("not a number of shards")


def _format(found: Found) -> Any:
    name = str(found.value).lower()
    strategy, _, loader = name.partition(".")
    if str(found.config.get("rl")).lower() == "kto":
        if loader == "argilla_chat":
            return "unpaired_preference"
        return Lost("rows of KTO are prompt and completion as lists of turns, or messages, with a label", todo=True)
    if is_on(found.config.get("rl")):
        if strategy in PAIR_TEMPLATES and (loader or "default") in PAIR_COLUMNS:
            columns = {f"[].columns.{ours}": theirs for ours, theirs in PAIR_COLUMNS[loader or "default"].items()}
            return Settings({"[].format": "preference", **columns})
        return Lost("not a kind of preference rows here; the columns chosen and rejected are recognised")
    if strategy == "chat_template":
        return "conversations" if _is_sharegpt(found) else "messages"
    if form := SFT_TYPES.get(name) or SFT_TYPES.get(strategy):
        return form
    return Lost("not a format here; data.format: auto recognises the columns, data.columns renames them")


def _is_sharegpt(found: Found) -> bool:
    mappings = found.beside.get("message_property_mappings")
    default = found.beside.get("message_field_role", "role")
    role = mappings.get("role", default) if isinstance(mappings, dict) else default
    return bool(role == "from")


def _messages_column(found: Found) -> Any:
    if str(found.config.get("rl", "")).lower() in ("dpo", "ipo", "orpo", "simpo"):
        return Settings({"[].columns.prompt": found.value})
    form = "conversations" if _is_sharegpt(found) else "messages"
    return Settings({f"[].columns.{form}": found.value}) if form != found.value else Unneeded("it is the format's own")


def _role_name(found: Found) -> Any:
    """Roles and texts of turns are read from `role` and `content`, or from `from` and `value`."""
    known = ("role", "content", "from", "value")
    return only(
        dict.fromkeys(known, Unneeded("turns are read with these names")),
        "turns are {role, content} or {from, value}: rename the fields of the rows",
        todo=True,
    )(found)
