"""What the schema allows at a place, in words: read from the types and bounds of the fields, never repeated by hand."""

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlora_train.config.schema import RunConfig

WORDS = {str: "text", int: "a whole number", float: "a number", type(None): "null"}
SHOWN_KEYS = 4
BOUNDS = (
    (annotated_types.Ge, "ge", ">="),
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Le, "le", "<="),
    (annotated_types.Lt, "lt", "<"),
)


def is_section(path: Sequence[str | int]) -> bool:
    """Tell whether a path is the whole config or one of its sections."""
    return len(path) == 0 or (len(path) == 1 and path[0] in RunConfig.model_fields)


def key_models(path: Sequence[str | int]) -> list[type[BaseModel]]:
    """Return the models whose fields are the valid keys below `path`; none for a free mapping or a scalar."""
    models: list[type[BaseModel]] = [RunConfig]
    for key in path:
        if isinstance(key, int):
            continue
        spec = next((model.model_fields[key] for model in models if key in model.model_fields), None)
        models = list(_models_in(spec.annotation)) if spec else []
    return models


def allowed_values(path: Sequence[str | int]) -> str:
    """Return what may stand at `path`, such as `a whole number >= 1 or null`."""
    spec, inside = _field(path)
    if spec is None:
        return _mapping(RunConfig)
    if inside:
        return _inner(spec.annotation)
    if any(getattr(item, "pattern", None) for item in spec.metadata):
        return f"text such as {spec.default}"
    return _join(_describe(spec.annotation, spec.metadata))


def choices(path: Sequence[str | int]) -> list[str]:
    """Return the words that may be chosen at `path`."""
    spec, _ = _field(path)
    return [word for word in _literals(spec.annotation) if isinstance(word, str)] if spec else []


def takes_any_text(path: Sequence[str | int]) -> bool:
    """Tell whether `path` takes any text, so that a number in quotes would do."""
    spec, _ = _field(path)
    return spec is not None and not any(getattr(item, "pattern", None) for item in spec.metadata) and _has_text(spec)


def _has_text(spec: FieldInfo) -> bool:
    return str in _parts(spec.annotation)


def _mapping(model: type[BaseModel]) -> str:
    """Return a mapping's first keys, as `{path, split, ...}`."""
    names = list(model.model_fields)
    return "a mapping {" + ", ".join(names[:SHOWN_KEYS] + (["..."] if len(names) > SHOWN_KEYS else [])) + "}"


def _field(path: Sequence[str | int]) -> tuple[FieldInfo | None, bool]:
    """Return the field that holds `path`, and whether the path goes on inside a free mapping or a list of it."""
    spec: FieldInfo | None = None
    inside = False
    for depth, key in enumerate(path):
        models = key_models(path[:depth])
        found = next((model.model_fields[str(key)] for model in models if key in model.model_fields), None)
        inside = found is None
        spec = found or spec
    return spec, inside


def _parts(annotation: Any) -> list[Any]:
    """Return the branches of a union, or the type alone; Annotated and the items of a tuple stay as they are."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for branch in get_args(annotation) for part in _parts(branch)]
    return [annotation]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _models_in(part)


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
        return
    for part in get_args(annotation):
        yield from _literals(part)


def _describe(annotation: Any, metadata: Sequence[Any]) -> Iterator[str]:
    for part in _parts(annotation):
        origin, arguments = get_origin(part), get_args(part)
        if origin is Annotated:
            yield from _describe(arguments[0], arguments[1:])
        elif origin is Literal:
            yield from (str(word) for word in arguments)
        elif part is bool:
            yield from ("true", "false")
        elif origin is tuple:
            yield from _describe_list(arguments[0])
        elif origin is dict:
            yield "a mapping of names to " + _join(_describe(arguments[1], ()))
        elif isinstance(part, type) and issubclass(part, BaseModel):
            yield _mapping(part)
        else:
            yield WORDS[part] + (_bounds(metadata) if part in (int, float) else _form(metadata) if part is str else "")


def _describe_list(item: Any) -> Iterator[str]:
    models = list(_models_in(item))
    if models:
        yield "a path or Hub id"
        yield _mapping(models[0])
        yield "a list of these"
    else:
        words = list(_literals(item))
        yield f"a list of {' and '.join(words)}" if words else "a list of names"


def _inner(annotation: Any) -> str:
    """Return what an item of a list, or a value of a free mapping, may be."""
    for part in _parts(annotation):
        origin, arguments = get_origin(part), get_args(part)
        if origin is dict:
            return _join(_describe(arguments[1], ()))
        if origin is tuple:
            models = list(_models_in(arguments[0]))
            source = f"a path or Hub id or {_mapping(models[0])}" if models else ""
            return source or _join(_describe(arguments[0], ()))
    return _join(_describe(annotation, ()))


def _bounds(metadata: Sequence[Any]) -> str:
    flat = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else (entry,))]
    words = [f"{word} {getattr(item, name)}" for item in flat for kind, name, word in BOUNDS if isinstance(item, kind)]
    return " " + " and ".join(words) if words else ""


def _form(metadata: Sequence[Any]) -> str:
    return " (not empty)" if any(isinstance(item, annotated_types.MinLen) for item in metadata) else ""


def _join(words: Iterator[str]) -> str:
    listed = list(dict.fromkeys(words))
    return listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " or " + listed[-1]
