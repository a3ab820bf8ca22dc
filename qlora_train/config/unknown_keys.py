"""What an unknown key may be: one of another section, of another trainer, or a misspelling."""

from collections.abc import Iterator, Sequence
from itertools import islice

from qlora_train.config.allowed_values import valid_keys
from qlora_train.config.other_trainers.key_hints import key_hint, pattern_hint
from qlora_train.config.schema import RunConfig
from qlora_train.config.yaml_reader import Node
from qlora_train.utils.errors import nearest_names, num_edits

MAX_INNER_HINTS = 4
MAX_EDITS = 2

Path = tuple[str | int, ...]


def unknown_key_text(path: Path, node: Node | None) -> str:
    """Return the error of an unknown key or section, `node` its value."""
    name = str(path[-1])
    what = "unknown section" if len(path) == 1 and (node is None or isinstance(node.value, dict)) else "unknown key"
    beside = valid_keys(path[:-1])
    section, _, key = name.partition(".")
    if len(path) == 1 and key in valid_keys((section,)):
        return f"{what}; a dot is for overrides; write {key} below {section}:, indented"
    if homes := _homes(name):
        return f"{what}; here it is {' or '.join(homes)}"
    inner = list(islice(_inner_keys(name, node), MAX_INNER_HINTS)) if node else []
    if hints := [f"{each}: {hint}" for each in inner if (hint := key_hint(each, whole=True, patterns=True))]:
        return f"{what}; {'; '.join(hints)}"
    if hint := _hint_in(path[:-1], name):
        return f"{what}; {hint}"
    if close := nearest_names(name, beside) or _nearest_elsewhere(name):
        return f"{what}; {did_you_mean_text(close)}"
    return f"{what}; {pattern_hint(name) or 'allowed: ' + ', '.join(beside)}"


def meant_keys(path: Path) -> list[str]:
    """Return the valid keys beside the last key of `path` that it stands for: another trainer's, or a misspelling."""
    beside = valid_keys(path[:-1])
    hint = _hint_in(path[:-1], str(path[-1])) or ""
    begin = ".".join(str(key) for key in path[:-1])
    if named := [key for key in beside if f"here it is {begin}.{key}" in hint]:
        return named
    return nearest_names(str(path[-1]), beside)


def where_it_is(name: str) -> str | None:
    """Return the answer for a setting without its section: ours, another trainer's, or a misspelling; or None."""
    if homes := _homes(name):
        return f"here it is {' or '.join(homes)}"
    if hint := key_hint(name):
        return hint
    close = _nearest_elsewhere(name)
    return did_you_mean_text(close) if close else None


def did_you_mean_text(names: Sequence[str]) -> str:
    """Return the question whether one of the names was meant."""
    return f"did you mean {' or '.join(names)}?"


def _homes(name: str) -> list[str]:
    """Return the settings with this key, as `section.key`."""
    return [f"{section}.{name}" for section in RunConfig.model_fields if name in valid_keys((section,))]


def _hint_in(holder: Path, name: str) -> str | None:
    """Return the hint for a key in a section, or in a source of data."""
    place = "datasets[]" if len(holder) > 1 and holder[0] == "data" else ".".join(str(key) for key in holder)
    return (key_hint(f"{place}.{name}", whole=True) if place else None) or key_hint(name)


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
    close = [key for key in nearest_names(name, keys) if num_edits(name.lower(), key) <= MAX_EDITS]
    return [
        home for section in RunConfig.model_fields for key in close for home in _homes(key) if home.startswith(section)
    ]
