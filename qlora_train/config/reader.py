"""From a YAML file and `section.key=value` overrides to a checked `RunConfig`, with every problem reported at once.

Checks that compare several settings run after each of them is right by itself: a comparison with a value that is wrong
anyway would only mislead.
"""

import codecs
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from qlora_train.config.schema import RunConfig
from qlora_train.config.secret_check import secrets_in, secrets_typed
from qlora_train.config.source_location import Problem, SourceLocation
from qlora_train.config.validation_errors import found_value, problems_of
from qlora_train.config.yaml_reader import Node, read_yaml
from qlora_train.utils.errors import ConfigError, nearest_names

MAX_BYTES = 1_000_000
MAX_LINES = 200
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "begins with a byte order mark",
    codecs.BOM_UTF16_LE: "is UTF-16",
    codecs.BOM_UTF16_BE: "is UTF-16",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and check a config.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, the value as YAML; later ones win. A value is replaced as a whole.

    Raises:
        ConfigError: one line for every problem, each beginning with ``file:line: section.key`` or the override.
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
    """Return the checked config and the tree it was read from, whose nodes know where they were written.

    Raises:
        ConfigError: as `load_config`; secrets are said alone, for what is said of other problems may quote them.
    """
    if secrets := list(secrets_typed(str(path), overrides)):
        raise ConfigError(_lines(secrets))
    root, problems = _read_file(Path(path))
    for override in overrides:
        problems += _apply_override(root, override)
    _fill_empty_sections(root)
    try:
        config = RunConfig.model_validate(root.plain(), strict=True)
    except ValidationError as error:
        answered = {(problem.place, problem.name) for problem in problems}
        problems += [item for item in problems_of(error, root) if (item.place, item.name) not in answered]
    if problems:
        raise ConfigError(_lines(problems))
    return config, root


def _lines(problems: Sequence[Problem]) -> list[str]:
    ordered = sorted(problems, key=lambda problem: problem.place.order)
    lines = list(dict.fromkeys(str(problem) for problem in ordered[:MAX_LINES]))
    more = len(ordered) - MAX_LINES
    return [*lines, f"and {more} more problems, not listed"] if more > 0 else lines


def _read_file(path: Path) -> tuple[Node, list[Problem]]:
    """Return the tree of the file; what makes it unreadable as a whole is raised, what is wrong inside is listed."""
    text = _decode(path, _read_bytes(path))
    root, problems = read_yaml(text, lambda line: SourceLocation(str(path), line))
    if secrets := list(secrets_in(root)):
        raise ConfigError(_lines(secrets))
    if problems and root.value is None:
        raise ConfigError(_lines(problems))
    if root.value is None:
        raise ConfigError(f"{path}: empty; a config needs at least model.model_name_or_path and data.train")
    if not isinstance(root.value, dict):
        sections = ", ".join(RunConfig.model_fields)
        raise ConfigError(f"{root.place}: not a mapping (found {found_value(root.plain())}); sections are {sections}")
    return root, problems


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
    files = {file.name: file for folder in reversed(folders) for file in folder.iterdir() if file.is_file()}
    stems = {file.stem: file for file in files.values()}
    close = nearest_names(path.stem, stems)
    return f"; did you mean {' or '.join(str(stems[stem]) for stem in close)}?" if close else ""


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
    """Set one value in the tree; return what is wrong with the override."""
    name, equals, text = override.partition("=")
    place = SourceLocation("override " + " ".join(override.split()))
    keys = name.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        return [Problem(place, "", "not an override; write section.key=value, such as train.learning_rate=1e-4")]
    value, problems = read_yaml(text, lambda _: place)
    if problems:
        return problems
    node = root
    for depth, key in enumerate(keys[:-1], start=1):
        child = node.child(key)
        if child is None or child.value is None:
            child = node.value[key] = Node({}, place)
        if not isinstance(child.value, dict):
            parent = ".".join(keys[:depth])
            found = found_value(child.plain())
            return [Problem(place, "", f"{parent} is not a mapping (found {found}); give {parent} as a whole")]
        node = child
    node.value[keys[-1]] = value
    return []


def _fill_empty_sections(root: Node) -> None:
    """Read a section without keys as all defaults: people comment all of its lines out."""
    for name in RunConfig.model_fields:
        section = root.child(name)
        if section is not None and section.value is None:
            section.value = {}
