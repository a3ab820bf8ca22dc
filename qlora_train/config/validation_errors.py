"""Pydantic's errors as messages: one per YAML node, with its location, the value found and the values allowed."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
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
from qlora_train.config.other_trainers.key_hints import key_hint, pattern_hint
from qlora_train.config.other_trainers.recognition import is_clearly_of, recognise
from qlora_train.config.schema import RunConfig
from qlora_train.config.source_location import Problem, SourceLocation, found_value
from qlora_train.config.yaml_reader import Node, core_scalar
from qlora_train.utils.errors import listed, nearest_names, num_edits

RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
LENGTH_ERRORS = {"too_short", "string_too_short"}
OWN_ERRORS = {"value_error", "assertion_error"}
MAX_ERRORS = 100
MAX_INNER_HINTS = 4

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


def meant_keys(path: Path) -> list[str]:
    """Return the valid keys beside the last key of `path` that it stands for: another trainer's, or a misspelling."""
    beside = valid_keys(path[:-1])
    hint = key_hint(str(path[-1])) or ""
    if named := [key for key in beside if f"here it is {path_name((*path[:-1], key))}" in hint]:
        return named
    return nearest_names(str(path[-1]), beside)


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
        return _unknown_text(path, root.descendant(path))
    if "missing" in found.types:
        if len(path) > 1:
            return f"missing; allowed: {allowed_values(path)}"
        return f"missing; the section is needed and must hold {', '.join(required_keys(str(path[0])))}"
    own = next((_message(item) for item in found.details if item["type"] in OWN_ERRORS), None)
    if own is not None:
        return re.sub(rf"^(\w+\.)?{re.escape(str(path[-1]))}:? ", "", own) if path else own
    node = root.descendant(path)
    value = node.plain() if node else None
    return f"{_wrong(path, value, found.types)} (found {found_value(value)}); {_allowed(path, value)}"


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
    if not isinstance(value, str):
        return f"{text}, in quotes" if isinstance(value, int | float) and takes_any_text(path) else text
    if close := nearest_names(value, choices(path)):
        return f"{_did_you_mean(close)} {text}"
    return f"{text}, without quotes" if isinstance(core_scalar(value), int | float) else text


def _unknown_text(path: Path, node: Node | None) -> str:
    name = str(path[-1])
    inner = list(islice(_inner_keys(name, node), MAX_INNER_HINTS)) if node else []
    what = "unknown section" if len(path) == 1 and (node is None or isinstance(node.value, dict)) else "unknown key"
    if homes := [f"{section}.{name}" for section in RunConfig.model_fields if name in valid_keys((section,))]:
        return f"{what}; here it is {' or '.join(homes)}"
    if hints := [f"{key}: {hint}" for key in inner if (hint := key_hint(key, whole=True))]:
        return f"{what}; {'; '.join(hints)}"
    in_a_source = any(isinstance(key, int) for key in path)
    if hint := (key_hint(f"datasets[].{name}") if in_a_source else None) or key_hint(name):
        return f"{what}; {hint}"
    if close := nearest_names(name, valid_keys(path[:-1])) or _nearest_elsewhere(name):
        return f"{what}; {_did_you_mean(close)}"
    if hint := pattern_hint(name):
        return f"{what}; {hint}"
    return f"{what}; allowed: {', '.join(valid_keys(path[:-1]))}"


def _inner_keys(name: str, node: Node) -> Iterator[str]:
    """Yield the dotted keys below an unknown one."""
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield f"{name}.{key}"
            yield from _inner_keys(f"{name}.{key}", child)
    elif isinstance(node.value, list):
        for child in node.value[:1]:
            yield from _inner_keys(f"{name}[]", child)


def _nearest_elsewhere(name: str) -> list[str]:
    """Return the settings of any section whose key is nearest, as `section.key`."""
    keys = {key for section in RunConfig.model_fields for key in valid_keys((section,))}
    close = nearest_names(name, keys)
    return [
        f"{section}.{key}"
        for section in RunConfig.model_fields
        for key in valid_keys((section,))
        if key in close and num_edits(name.lower(), key) < 3
    ]


def _did_you_mean(names: Sequence[str]) -> str:
    return f"did you mean {' or '.join(names)}?"
