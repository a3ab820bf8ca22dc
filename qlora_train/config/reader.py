"""Read a YAML file and `section.key=value` overrides into a validated `RunConfig`; report all problems at once.

A config holds no secrets: it is saved with every run. Secrets are checked first, because other messages quote values.
"""

import codecs
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from qlora_train.config.path_checks import KINDS, data_file_type
from qlora_train.config.schema import RunConfig
from qlora_train.config.source_location import Problem, SourceLocation, found_value
from qlora_train.config.yaml_reader import Node, read_yaml
from qlora_train.utils.errors import ConfigError, did_you_mean
from qlora_train.utils.secrets import redact, secret_error

MAX_BYTES = 1_000_000
MAX_LINES = 200
DATA_KINDS = {*KINDS} - {"json", "txt"}
"""Kinds of files that are never a config."""
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "begins with a byte order mark",
    codecs.BOM_UTF16_LE: "is UTF-16",
    codecs.BOM_UTF16_BE: "is UTF-16",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config and apply overrides.

    Args:
        overrides: `section.key=value`, the value as YAML; later ones win and replace the whole value.

    Raises:
        ConfigError: one line per problem, each with ``file:line: section.key`` or the override.
    """
    return load_with_locations(path, overrides)[0]


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a config; `run.output_dir` defaults to runs/<name of the file>.

    Raises:
        ConfigError: as `load_config`.
    """
    config = load_config(path, overrides)
    output_dir = config.run.output_dir or f"runs/{path.stem}"
    return config.model_copy(update={"run": config.run.model_copy(update={"output_dir": output_dir})})


def load_with_locations(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Node]:
    """Return the config and the tree of nodes with their source locations.

    Raises:
        ConfigError: as `load_config`; if there are secrets, only these are reported.
    """
    if secrets := list(_secrets_in_arguments(str(path), overrides)):
        raise ConfigError(_lines(secrets))
    root, problems = _read_file(Path(path))
    for override in overrides:
        problems += _apply_override(root, override)
    _fill_empty_sections(root)
    try:
        config = RunConfig.model_validate(root.plain(), strict=True)
    except ValidationError as error:
        from qlora_train.config.validation_errors import problems_of

        known = {(problem.location, problem.name) for problem in problems}
        problems += [item for item in problems_of(error, root) if (item.location, item.name) not in known]
    if problems:
        raise ConfigError(_lines(problems))
    return config, root


def _lines(problems: Sequence[Problem]) -> list[str]:
    ordered = sorted(problems, key=lambda problem: problem.location.order)
    lines = list(dict.fromkeys(str(problem) for problem in ordered[:MAX_LINES]))
    more = len(ordered) - MAX_LINES
    return [*lines, f"and {more} more problems, not listed"] if more > 0 else lines


def _read_file(path: Path) -> tuple[Node, list[Problem]]:
    """Return the tree of the file and the problems inside; raise if the file is unreadable as a whole."""
    text = read_text(path)
    root, problems = read_yaml(text, lambda line: SourceLocation(str(path), line))
    if secrets := list(_secrets_in(root)):
        raise ConfigError(_lines(secrets))
    if problems and root.value is None:
        raise ConfigError(_lines(problems))
    if root.value is None:
        raise ConfigError(f"{path}: empty; a config needs at least model.model_name_or_path and data.train")
    if not isinstance(root.value, dict):
        sections = ", ".join(RunConfig.model_fields)
        raise ConfigError(
            f"{root.location}: not a mapping (found {found_value(root.plain())}); sections are {sections}"
        )
    return root, problems


def read_text(path: Path) -> str:
    """Return the text of a config.

    Raises:
        ConfigError: no such file, not readable, too large, or not UTF-8.
    """
    content = _read_bytes(path)
    kind = data_file_type(path)
    if kind is not None and kind[0] in DATA_KINDS:
        command = shlex.join(["qlora-train", "new", "MODEL", "--data", str(path)])
        raise ConfigError(f"{path}: a data file, not a config; write one with: {command}")
    return _decode(path, content)


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: no such file{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder; name the YAML file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason}); check its name and permissions") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes; this is not a config")
    return content


def _nearest_file(path: Path) -> str:
    folders = [folder for folder in (path.parent, Path("configs"), Path("recipes")) if folder.is_dir()]
    files = {file.name: file for folder in reversed(folders) for file in folder.glob("*.y*ml") if file.is_file()}
    return did_you_mean(path.stem, {file.stem: str(file) for file in files.values()})


def _decode(path: Path, content: bytes) -> str:
    for mark, name in BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            raise ConfigError(f"{path}: the file {name}; save it as plain UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ConfigError(f"{path}:{line}: byte 0x{byte:02X} is not UTF-8; save the file as UTF-8") from None


def _apply_override(root: Node, override: str) -> list[Problem]:
    name, equals, text = override.partition("=")
    location = SourceLocation("override " + " ".join(override.split()))
    keys = name.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        return [Problem(location, "", f"not an override; write {_override_hint(name.strip() if equals else '')}")]
    value, problems = read_yaml(text, lambda _: location)
    if problems:
        return problems
    node = root
    for depth, key in enumerate(keys[:-1], start=1):
        child = node.child(key)
        if child is None or child.value is None:
            child = node.value[key] = Node({}, location)
        if not isinstance(child.value, dict):
            parent = ".".join(keys[:depth])
            found = found_value(child.plain())
            return [Problem(location, "", f"{parent} is not a mapping (found {found}); give {parent} as a whole")]
        node = child
    node.value[keys[-1]] = value
    return []


def _override_hint(name: str) -> str:
    """Return how to write an override whose name has no section."""
    from qlora_train.config.unknown_keys import where_it_is

    where = where_it_is(name) if re.fullmatch(r"\w+", name) else None
    return f"section.key=value: {where}" if where else "section.key=value, such as train.learning_rate=1e-4"


def _fill_empty_sections(root: Node) -> None:
    for name in RunConfig.model_fields:
        section = root.child(name)
        if section is not None and section.value is None:
            section.value = {}  # all of its lines are commented out


def _secrets_in(node: Node, name: str = "") -> Iterator[Problem]:
    if isinstance(node.value, str) and (text := secret_error(node.value)):
        yield Problem(node.location, name, text)
    elif isinstance(node.value, dict):
        for key, child in node.value.items():
            if text := secret_error(key):
                yield Problem(child.location, name, f"a key {text}")
            yield from _secrets_in(child, f"{name}.{redact(key)}" if name else redact(key))
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            yield from _secrets_in(child, f"{name}[{index}]")


def _secrets_in_arguments(path: str, overrides: Sequence[str]) -> Iterator[Problem]:
    if text := secret_error(path):
        yield Problem(SourceLocation("the name of the config file"), "", text)
    for override in overrides:
        if text := secret_error(override):
            key = redact(" ".join(override.partition("=")[0].split()))
            yield Problem(SourceLocation(f"override {key}"), "", text)
