"""The bundled recipes, with the comment of each setting, and the example rows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from qlora_train.config.source_location import SourceLocation
from qlora_train.config.yaml_reader import read_yaml
from qlora_train.utils.errors import ConfigError, did_you_mean

BUNDLED = files("qlora_train") / "bundled"
EXAMPLES = "data/examples/"
"""Folder of the example rows as recipes name it."""
COMMENT = re.compile(r"\s#\s*(?:yours[;:]?\s*)?(.*)$")


@dataclass(frozen=True, slots=True)
class Choice:
    """A value for a setting, and why."""

    value: Any
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe.

    Attributes:
        header: the first paragraph of its first comment.
        settings: by `section.key`, with the comment beside each as the reason.
    """

    name: str
    header: str
    settings: dict[str, Choice]

    @property
    def purpose(self) -> str:
        """The first sentence of the header."""
        return re.split(r"(?<=\.)\s|:\s", self.header, maxsplit=1)[0].rstrip(".:")


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name: str) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: no recipe has the name.
    """
    names = recipe_names()
    if name not in names:
        hint = did_you_mean(name, names)
        raise ConfigError(f"--recipe {name}: no such recipe{hint}; allowed: {', '.join(names)}; see --recipe list")
    text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    root, problems = read_yaml(text, lambda line: SourceLocation(name, line))
    assert not problems
    settings = {
        f"{section}.{key}": Choice(node.plain(), _comment(lines[(node.location.line or 0) - 1]))
        for section, keys in root.value.items()
        for key, node in keys.value.items()
    }
    return Recipe(name, " ".join(_header(lines)), settings)


def example_file(path: str) -> Path:
    """Return where the installed package has the example rows that a recipe names as `data/examples/...`."""
    with as_file(BUNDLED / "examples" / path.removeprefix(EXAMPLES)) as file:
        return file.resolve()


def _folder() -> Any:
    return BUNDLED / "recipes"


def _comment(line: str) -> str:
    match = COMMENT.search(line)
    return match[1].strip() if match else ""


def _header(lines: list[str]) -> Iterator[str]:
    """Yield the lines of the first paragraph, without the advice to copy the file."""
    for line in lines:
        text = line.removeprefix("#").strip()
        if not text or text == line:
            return
        if "Copy it and change" not in text:
            yield text
