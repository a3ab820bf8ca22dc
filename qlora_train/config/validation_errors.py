"""Pydantic's errors as messages: one per YAML node, with its location, the value found and the values allowed."""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_train.config.allowed_values import (
    allowed_values,
    choices,
    is_section,
    required_keys,
    takes_any_text,
    valid_keys,
)
from qlora_train.config.other_trainers.recognition import is_clearly_of, recognise
from qlora_train.config.other_trainers.value_hints import value_hint
from qlora_train.config.source_location import Problem, SourceLocation, found_value
from qlora_train.config.unknown_keys import did_you_mean_text, meant_keys, unknown_key_text
from qlora_train.config.yaml_reader import Node, core_scalar
from qlora_train.utils.errors import listed, nearest_names

RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
LENGTH_ERRORS = {"too_short", "string_too_short"}
OWN_ERRORS = {"value_error", "assertion_error"}
MAX_ERRORS = 100
FLAG = "true or false"
YES_OR_NO = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
"""Words for a flag elsewhere -> YAML 1.2's."""
ONLY_VALUE = {"model": "model_name_or_path", "data": "train"}
"""Sections that people write as one value -> the key that it is for."""

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class NodeErrors:
    """Pydantic's errors of one node; `location` is its parent's if the node is missing."""

    location: SourceLocation
    details: list[ErrorDetails]

    @property
    def types(self) -> set[str]:
        """Pydantic's error types."""
        return {item["type"] for item in self.details}


def problems_of(error: ValidationError, root: Node) -> list[Problem]:
    """Return one problem per YAML node of the tree `root` that has errors, or one if it is another trainer's config."""
    if theirs := _other_trainers_config(root):
        return [theirs]
    by_path: dict[Path, NodeErrors] = {}
    errors = error.errors(include_url=False)
    for details in errors[:MAX_ERRORS]:
        path, location = _locate(details, root)
        by_path.setdefault(path, NodeErrors(location, [])).details.append(details)
    by_path = _deepest_only(by_path)
    holders = {path[:-1] for path, found in by_path.items() if "missing" in found.types}
    unknown = [path for path, found in by_path.items() if "extra_forbidden" in found.types and path[:-1] in holders]
    misspelt = {(*path[:-1], key) for path in unknown for key in meant_keys(path)}
    problems = [
        Problem(found.location, path_name(path) or "config", _text(path, found, root))
        for path, found in by_path.items()
        if not (path in misspelt and "missing" in found.types)
    ]
    if len(errors) > MAX_ERRORS:
        problems.append(Problem(root.location, "", f"and {len(errors) - MAX_ERRORS} more problems, not listed"))
    return problems


def _other_trainers_config(root: Node) -> Problem | None:
    config = root.plain()
    found = recognise(config)
    if len(found) != 1 or not is_clearly_of(found[0], config):
        return None
    keys = listed([key for key in config if found[0].mapping_of(key)], 3)
    command = f"qlora-train convert {root.location.source} -o FILE.yaml"
    return Problem(root.location, "", f"a config of {found[0].title} (keys {keys}); convert it: {command}")


def path_name(path: Path) -> str:
    """Return a path as people write it: `data.train[0].path`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def _locate(details: ErrorDetails, root: Node) -> tuple[Path, SourceLocation]:
    path: Path = ()
    node = root
    for key in details["loc"]:
        child = node.child(key)
        if child is not None:  # Pydantic's union tags have no node
            path, node = (*path, key), child
    if details["type"] == "missing":
        path = (*path, details["loc"][-1])
    elif details["type"] in OWN_ERRORS and is_section(path):
        return _named_key(path, node, _message(details))
    return path, node.location


def _named_key(path: Path, node: Node, message: str) -> tuple[Path, SourceLocation]:
    """Return the first key that the message of a check over several keys names and the file has."""
    for word in re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)*", message):
        keys = tuple(word.split("."))
        if (found := node.descendant(keys)) is not None:
            return (*path, *keys), found.location
    return path, node.location


def _deepest_only(by_path: dict[Path, NodeErrors]) -> dict[Path, NodeErrors]:
    """Drop errors of nodes above others that have errors: they are from other branches of a union."""
    return {
        path: found
        for path, found in by_path.items()
        if is_section(path) or not any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
    }


def _message(details: ErrorDetails) -> str:
    return str(details.get("ctx", {}).get("error", details["msg"]))


def _text(path: Path, found: NodeErrors, root: Node) -> str:
    if "extra_forbidden" in found.types:
        return unknown_key_text(path, root.descendant(path))
    if "missing" in found.types:
        if len(path) > 1:
            return f"missing; allowed: {allowed_values(path)}"
        return f"missing; the section is needed and must hold {', '.join(required_keys(str(path[0])))}"
    own = next((_message(item) for item in found.details if item["type"] in OWN_ERRORS), None)
    if own is not None:
        return re.sub(rf"^(\w+\.)?{re.escape(str(path[-1]))}:? ", "", own) if path else own
    node = root.descendant(path)
    value = node.plain() if node else None
    wrong = f"{_wrong(path, value, found.types)} (found {found_value(value)})"
    if len(path) == 1 and isinstance(value, str):
        return f"{wrong}; {_section_hint(str(path[0]), value) or _allowed(path, value)}"
    return f"{wrong}; {_allowed(path, value)}"


def _section_hint(section: str, value: str) -> str | None:
    """Return how to write what stands instead of a section."""
    word = value.partition(" ")[0]
    if word != value and word in valid_keys((section,)):
        return f"write a colon after {word}"
    if section == "train":
        return "the rows are data.train; this section has settings such as train.learning_rate"
    key = ONLY_VALUE.get(section)
    return f"write {section}: {{{key}: {value}}}" if key else None


def _wrong(path: Path, value: Any, types: set[str]) -> str:
    if types & RANGE_ERRORS:
        return "out of range"
    if types & LENGTH_ERRORS and value in ("", ()):
        return "empty"
    if isinstance(value, str) and "literal_error" in types:
        return "not one of the choices"
    if "string_pattern_mismatch" in types:
        return "not of the expected form"
    return "not a mapping" if len(path) <= 1 else "the wrong type"


def _allowed(path: Path, value: Any) -> str:
    text = f"allowed: {allowed_values(path)}"
    if hint := value_hint(path_name(path), value, choices(path)):
        return f"{hint}; {text}"
    if allowed_values(path) == FLAG and str(value).lower() in YES_OR_NO:
        return f"write {YES_OR_NO[str(value).lower()]}; {text}"
    if not isinstance(value, str):
        return f"{text}, in quotes" if isinstance(value, int | float) and takes_any_text(path) else text
    if close := nearest_names(value, choices(path)):
        return f"{did_you_mean_text(close)} {text}"
    return f"{text}, without quotes" if isinstance(core_scalar(value), int | float) else text
