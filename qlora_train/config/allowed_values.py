"""The values that a setting allows, in words, read from the JSON schema of the config."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from qlora_train.config.schema import RunConfig

Path = Sequence[str | int]
WORDS = {"string": "text", "integer": "a whole number", "number": "a number", "null": "null"}
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
SHOWN_KEYS = 4


def is_section(path: Path) -> bool:
    """Tell whether a path is the whole config or one of its sections."""
    return len(path) == 0 or (len(path) == 1 and path[0] in RunConfig.model_fields)


def valid_keys(path: Path) -> list[str]:
    """Return the keys of the mappings with fixed keys that `path` allows."""
    return list(_valid_keys(tuple(path)))


@cache
def _valid_keys(path: tuple[str | int, ...]) -> tuple[str, ...]:
    specs = [part for spec in _branches(path) for part in (spec, *_items(spec))]
    return tuple(dict.fromkeys(key for spec in specs for key in spec.get("properties", ())))


def required_keys(section: str) -> list[str]:
    """Return the keys of a section that have no default."""
    return [key for spec in _branches((section,)) for key in spec["required"]]


def allowed_values(path: Path) -> str:
    """Return what `path` allows, such as `a whole number >= 1 or null`."""
    words = list(dict.fromkeys(word for spec in _branches(path) for word in _describe(spec)))
    if path and isinstance(path[-1], int) and words[0].startswith("a mapping {"):
        words.insert(0, "a path or Hub id")
        return " or ".join(words)
    return _join(words)


def choices(path: Path) -> list[str]:
    """Return the words that `path`, or an item of its list, can be."""
    specs = [part for spec in _branches(path) for part in (spec, *_items(spec))]
    return [word for spec in specs for word in _words(spec)]


def takes_any_text(path: Path) -> bool:
    """Tell whether `path` takes any text, so that a number in quotes is valid."""
    return any(spec.get("type") == "string" and "pattern" not in spec and not _words(spec) for spec in _branches(path))


@cache
def _schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def _branches(path: Path) -> list[dict[str, Any]]:
    """Return the alternatives of the union at `path`, without references."""
    specs = list(_alternatives(_schema()))
    for key in path:
        items = [part for spec in specs for part in _items(spec)]
        if isinstance(key, int):
            below = items
        else:
            specs += items  # an only item may stand without its list
            below = [spec["properties"][key] for spec in specs if key in spec.get("properties", ())]
            below = below or [rest for spec in specs if isinstance(rest := spec.get("additionalProperties"), dict)]
        specs = [part for spec in below for part in _alternatives(spec)]
    return specs


def _alternatives(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "$ref" in spec:
        yield from _alternatives(_schema()["$defs"][spec["$ref"].rpartition("/")[2]])
    elif "anyOf" in spec:
        for part in spec["anyOf"]:
            yield from _alternatives(part)
    else:
        yield spec


def _items(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return list(_alternatives(spec["items"])) if "items" in spec else []


def _words(spec: dict[str, Any]) -> list[str]:
    return list(spec["enum"]) if "enum" in spec else [spec["const"]] if "const" in spec else []


def _describe(spec: dict[str, Any]) -> Iterator[str]:
    kind = spec.get("type")
    if words := _words(spec):
        yield from words
    elif kind == "boolean":
        yield from ("true", "false")
    elif kind == "array":
        yield from _describe_list(_items(spec))
    elif "properties" in spec:
        names = list(spec["properties"])
        yield "a mapping {" + ", ".join(names[:SHOWN_KEYS] + ["..."] * (len(names) > SHOWN_KEYS)) + "}"
    elif kind == "object":
        values = [word for part in _alternatives(spec["additionalProperties"]) for word in _describe(part)]
        yield "a mapping of names to " + _join(values)
    elif "pattern" in spec:
        yield f"text such as {spec['default']}"
    else:
        bounds = [f"{sign} {spec[name]}" for name, sign in BOUNDS.items() if name in spec]
        not_empty = " (not empty)" if "minLength" in spec else ""
        yield " ".join([WORDS[str(kind)] + not_empty, *([" and ".join(bounds)] if bounds else [])])


def _describe_list(items: list[dict[str, Any]]) -> Iterator[str]:
    [item] = items
    if "properties" in item:
        yield from ("a path or Hub id", *_describe(item), "a list of these")
    else:
        yield f"a list of {' and '.join(_words(item)) or 'names'}"


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
