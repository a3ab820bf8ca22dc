"""Every command in README, docs and recipes parses, and every setting that it names exists."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from qlora_train.cli.main import COMMANDS, _function
from qlora_train.config import load_config
from qlora_train.config.resume_policy import flat_settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUOTED = re.compile(r"`(qlora-train [^`]+)`")
ALONE = re.compile(r"^(?:[A-Z_]+=\S* |srun .*)?(qlora-train [^\n]+)$", re.MULTILINE)
STAND_IN = ROOT / "recipes" / "chat.yaml"
"""For a config of the reader's own."""


def documented(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command, without its comment."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    for line in [*QUOTED.findall(text), *ALONE.findall(blocks)]:
        yield shlex.split(line.replace("\n", " "), comments=True)[1:]


def commands() -> list[list[str]]:
    unique = {tuple(words) for page in PAGES for words in documented(page)}
    return [list(words) for words in sorted(unique) if not any(word.startswith(("...", "[")) for word in words)]


def test_there_are_commands_to_try() -> None:
    assert len(commands()) > 40
    assert {words[0] for words in commands()} >= COMMANDS.keys() - {"train"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_documented_command_parses(words: list[str]) -> None:
    if words[0].startswith("-"):
        return  # --help, --version
    if words[0] not in COMMANDS:
        words = ["train", *words]
    if len(words) == 1:
        return  # a command by its name
    app = typer.Typer()
    for name, row in COMMANDS.items():
        app.command(name)(_function(row))
    command = typer.main.get_group(app).commands[words[0]]
    parameters = command.make_context(words[0], words[1:]).params
    if "config" in parameters and parameters.get("overrides"):
        config = ROOT / parameters["config"]
        resolved = load_config(config if config.exists() else STAND_IN, parameters["overrides"])
        settings = flat_settings(resolved.model_dump())
        assert {override.partition("=")[0] for override in parameters["overrides"]} <= settings.keys()
