"""Pydantic's errors as lines for people: one a YAML node, with its place, what was found and what is allowed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qlora_train.config.allowed_values import allowed_values, choices, is_section, key_models, takes_any_text
from qlora_train.config.other_trainers import OTHER_NAMES, UNSUPPORTED
from qlora_train.config.schema import RunConfig
from qlora_train.config.source_location import Problem, SourceLocation
from qlora_train.config.yaml_reader import Node, core_scalar
from qlora_train.utils.errors import nearest_names

RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
LENGTH_ERRORS = {"too_short", "string_too_short"}
SHOWN_CHARACTERS = 60
MAX_ERRORS = 100


@dataclass(frozen=True)
class Located:
    """A Pydantic error led back to the node it is about; `place` is that node's, or its parent's when it is missing."""

    path: tuple[str | int, ...]
    place: SourceLocation
    details: ErrorDetails


def problems_of(error: ValidationError, root: Node) -> list[Problem]:
    """Return one problem a YAML node for everything that `error` holds against the tree `root`."""
    by_node: dict[tuple[str | int, ...], list[Located]] = {}
    errors = error.errors(include_url=False)
    for details in errors[:MAX_ERRORS]:
        located = _locate(details, root)
        by_node.setdefault(located.path, []).append(located)
    blamed = _deepest_only(by_node)
    mistyped = {(*path[:-1], key) for path, found in blamed.items() if _is_unknown(found) for key in nearest_keys(path)}
    problems = [
        Problem(found[0].place, path_name(path) or "config", _text(path, found, root))
        for path, found in blamed.items()
        if not (path in mistyped and _is_missing(found))
    ]
    if len(errors) > MAX_ERRORS:
        problems.append(Problem(root.place, "", f"and {len(errors) - MAX_ERRORS} more problems, not listed"))
    return problems


def found_value(value: Any) -> str:
    """Return a value as a message shows it: as YAML, and short."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def path_name(path: Sequence[str | int]) -> str:
    """Return a path as people write it: `data.train[0].path`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def nearest_keys(path: Sequence[str | int]) -> list[str]:
    """Return the valid keys that the last one of `path` may be meant for, among those valid there."""
    section, _, key = OTHER_NAMES.get(str(path[-1]).lower(), "").partition(".")
    if path[:-1] == (section,):
        return [key]
    return nearest_names(str(path[-1]), [name for model in key_models(path[:-1]) for name in model.model_fields])


def _locate(details: ErrorDetails, root: Node) -> Located:
    """Follow the location through the tree, past what has no node: Pydantic's union tags and wrapped indices."""
    path: tuple[str | int, ...] = ()
    node = root
    for key in details["loc"]:
        child = node.child(key)
        if child is not None:
            path, node = (*path, key), child
    if details["type"] == "missing":
        path = (*path, details["loc"][-1])
    elif details["type"] in ("value_error", "assertion_error"):
        path, node = _blamed_key(path, node, _message(details))
    return Located(path, node.place, details)


def _blamed_key(path: tuple[str | int, ...], node: Node, message: str) -> tuple[tuple[str | int, ...], Node]:
    """Return the node that a check over several keys is about: the first that its message names and the file has."""
    for word in re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)*", message) if is_section(path) else ():
        keys = tuple(word.split("."))
        found: Node | None = node
        for key in keys:
            found = found.child(key) if found else None
        if found is not None:
            return (*path, *keys), found
    return path, node


def _deepest_only(by_node: dict[tuple[str | int, ...], list[Located]]) -> dict[tuple[str | int, ...], list[Located]]:
    """Drop a node's errors when one below it has any: they are the other branches of a union."""
    return {
        path: found
        for path, found in by_node.items()
        if is_section(path) or not any(len(other) > len(path) and other[: len(path)] == path for other in by_node)
    }


def _is_unknown(found: Sequence[Located]) -> bool:
    return any(item.details["type"] == "extra_forbidden" for item in found)


def _is_missing(found: Sequence[Located]) -> bool:
    return any(item.details["type"] == "missing" for item in found)


def _message(details: ErrorDetails) -> str:
    return str(details.get("ctx", {}).get("error", details["msg"]))


def _text(path: tuple[str | int, ...], found: Sequence[Located], root: Node) -> str:
    if _is_unknown(found):
        return _unknown_text(path)
    if _is_missing(found):
        return f"missing; {_needed(path)}"
    for item in found:
        if item.details["type"] in ("value_error", "assertion_error"):
            name = str(path[-1]) if path else ""
            return (
                re.sub(rf"^(\w+\.)?{re.escape(name)}:? ", "", _message(item.details))
                if name
                else _message(item.details)
            )
    value = _value(path, root)
    return f"{_wrong(path, value, found)} (found {found_value(value)}); {_allowed(path, value)}"


def _needed(path: Sequence[str | int]) -> str:
    if len(path) == 1:
        model = cast(type[BaseModel], RunConfig.model_fields[str(path[0])].annotation)
        needed = [name for name, spec in model.model_fields.items() if spec.is_required()]
        return f"the section is needed and must hold {', '.join(needed)}"
    return f"allowed: {allowed_values(path)}"


def _value(path: Sequence[str | int], root: Node) -> Any:
    node: Node | None = root
    for key in path:
        node = node.child(key) if node else None
    return node.plain() if node else None


def _wrong(path: Sequence[str | int], value: Any, found: Sequence[Located]) -> str:
    types = {item.details["type"] for item in found}
    if types & RANGE_ERRORS:
        return "out of range"
    if types & LENGTH_ERRORS and value in ("", ()):
        return "empty"
    if isinstance(value, str) and "literal_error" in types:
        return "not one of the choices"
    if "string_pattern_mismatch" in types:
        return "not of the expected form"
    return "not a mapping" if len(path) <= 1 else "the wrong type"


def _allowed(path: Sequence[str | int], value: Any) -> str:
    text = f"allowed: {allowed_values(path)}"
    if not isinstance(value, str):
        return f"{text}, in quotes" if isinstance(value, int | float) and takes_any_text(path) else text
    close = nearest_names(value, choices(path))
    if close:
        return f"did you mean {' or '.join(close)}? {text}"
    return f"{text}, without quotes" if isinstance(core_scalar(value), int | float) else text


def _unknown_text(path: Sequence[str | int]) -> str:
    name = str(path[-1])
    what = "section" if len(path) == 1 else "key"
    homes = [section for section in RunConfig.model_fields if name in key_models((section,))[0].model_fields]
    if homes:
        return f"unknown {what}; {name} belongs in {' or '.join(homes)}"
    if name.lower() in UNSUPPORTED:
        return f"unknown {what}; {UNSUPPORTED[name.lower()]}"
    meant = OTHER_NAMES.get(name.lower())
    if meant is not None:
        return f"unknown {what}; did you mean {meant}?"
    close = nearest_keys(path)
    if close:
        return f"unknown {what}; did you mean {' or '.join(close)}?"
    names = [key for model in key_models(path[:-1]) for key in model.model_fields]
    return f"unknown {what}; allowed: {', '.join(names)}"
