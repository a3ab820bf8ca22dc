"""Read the config of another trainer: YAML or JSON, or a command line in a shell script."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_train.config.other_trainers.all_trainers import OTHER_TRAINERS
from qlora_train.config.other_trainers.key_mapping import OtherTrainer
from qlora_train.config.other_trainers.recognition import is_mostly_of, recognise
from qlora_train.config.reader import read_text
from qlora_train.config.source_location import SourceLocation
from qlora_train.config.yaml_reader import core_scalar, read_yaml
from qlora_train.utils.errors import ConfigError, did_you_mean

SCRIPT_SUFFIXES = (".sh", ".bash", ".cmd", ".txt")
ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*")
INTERPOLATION = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
CONFIG_SUFFIXES = (".yaml", ".yml")
CONFIG_OPTIONS = ("config", "c")
COMMAND = "command"
"""Key of the subcommand, or script, of a trainer whose options do not say what it trains."""
SUBCOMMANDS = ("train", "sft", "dpo", "rlhf", "pt", "run", "launch", "preprocess", "kto", "orpo")


@dataclass(frozen=True)
class OtherConfig:
    """Another trainer's config, and lines of its script that say something else."""

    path: Path
    trainer: OtherTrainer
    values: Mapping[str, Any]
    other_lines: tuple[str, ...] = field(default=())


def read_other_config(path: Path, trainer: str | None = None) -> OtherConfig:
    """Read a file and recognise its trainer, unless it is named.

    Raises:
        ConfigError: unreadable, no mapping, no command, or the trainer is unclear.
    """
    if trainer is not None and trainer not in OTHER_TRAINERS:
        names = ", ".join(OTHER_TRAINERS)
        raise ConfigError(
            f"--from {trainer}: not a known trainer; allowed: {names}{did_you_mean(trainer, list(OTHER_TRAINERS))}"
        )
    text = read_text(path)
    if path.suffix.lower() in SCRIPT_SUFFIXES:
        return _read_script(path, text, trainer)
    values = _resolved(_read_mapping(path, text))
    if isinstance(values.get("model"), Mapping) and "model_name_or_path" in values["model"]:
        raise ConfigError(f"{path}: a config of qlora-train already; train it: qlora-train {path}")
    return OtherConfig(path, OTHER_TRAINERS[trainer] if trainer else _only_one(path, values), values)


def _only_one(path: Path, values: Mapping[str, Any]) -> OtherTrainer:
    found = [trainer for trainer in recognise(values) if is_mostly_of(trainer, values)]
    if len(found) == 1:
        return found[0]
    names = " or ".join(each.name for each in found)
    what = f"may be of {names}" if found else f"has keys of no known trainer ({', '.join(OTHER_TRAINERS)})"
    raise ConfigError(
        f"{path}: {what}; name the trainer: --from {found[0].name if found else next(iter(OTHER_TRAINERS))}"
    )


def _read_mapping(path: Path, text: str) -> dict[str, Any]:
    root, problems = read_yaml(text, lambda line: SourceLocation(str(path), line))
    if problems:
        raise ConfigError([str(problem) for problem in problems])
    values = root.plain()
    if not isinstance(values, dict) or not values:
        raise ConfigError(
            f"{path}: not a mapping of settings; give a trainer's YAML file, or its command in a .sh file"
        )
    return values


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """Replace `${key}`, as in torchtune's files, by the value of the key."""

    def look_up(match: re.Match[str]) -> str:
        value: Any = values
        for part in match[1].split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return str(value) if isinstance(value, str | int | float) else match[0]

    def resolve(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: resolve(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [resolve(item) for item in value]
        return INTERPOLATION.sub(look_up, value) if isinstance(value, str) else value

    return {key: resolve(value) for key, value in values.items()}


def _read_script(path: Path, text: str, trainer: str | None) -> OtherConfig:
    """Read the one command of the script that is a trainer's."""
    commands, others = [], []
    for words in _command_words(path, text):
        found = _program(words, trainer)
        if found:
            commands.append((words, *found))
        elif words:
            others.append(" ".join(words))
    if len(commands) != 1:
        programs = ", ".join(word for each in OTHER_TRAINERS.values() for word in each.programs)
        raise ConfigError(f"{path}: {len(commands)} commands of a trainer; allowed: one, of {programs}")
    [(words, position, owner)] = commands
    values = _with_config_file(_options(words, position))
    if COMMAND in owner.keys:
        values[COMMAND] = Path(words[position]).stem if words[position].endswith(".py") else words[position + 1]
    return OtherConfig(path, owner, values, tuple(others))


def _with_config_file(options: dict[str, Any]) -> dict[str, Any]:
    """Add the settings of the YAML file that a command names, beneath its options."""
    named = [key for key, value in options.items() if key.endswith(CONFIG_SUFFIXES) and value is True]
    named += [key for key in CONFIG_OPTIONS if str(options.get(key, "")).endswith(CONFIG_SUFFIXES)]
    if len(named) != 1:
        return options
    file = Path(named[0] if options[named[0]] is True else str(options[named[0]]))
    if not file.is_file():
        return options
    rest = {key: value for key, value in options.items() if key != named[0]}
    return _resolved(_read_mapping(file, read_text(file)) | rest)


def _command_words(path: Path, text: str) -> Iterator[list[str]]:
    """Yield the words of each command; a quoted text may go over several lines."""
    begun = ""
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(begun + line, comments=True)
        except ValueError:
            begun += line + "\n"
        else:
            begun = ""
            yield words
    if begun:
        raise ConfigError(f"{path}: a quote is not closed, in: {begun.strip().splitlines()[0][:60]}; close it")


def _program(words: list[str], trainer: str | None) -> tuple[int, OtherTrainer] | None:
    """Return the position of the trainer's program among the words, and the trainer; `pip install trl` is none."""
    for position, (word, following) in enumerate(pairwise([*words, ""])):
        if word.endswith((".py", ".train")) or following in SUBCOMMANDS:
            found = {
                program: each
                for each in OTHER_TRAINERS.values()
                for program in each.programs
                if f"/{word}".endswith(f"/{program}") and trainer in (None, each.name)
            }
            if found:
                return position, found[max(found, key=len)]
    return None


def _options(words: list[str], position: int) -> dict[str, Any]:
    """Return the options of a command, also of its launcher, as keys with `_`; variables set before it too."""
    values: dict[str, Any] = {}
    key = ""
    for index, word in enumerate(words):
        if index == position or (word in SUBCOMMANDS and not key):
            key = ""
        elif word.startswith("--") or re.fullmatch("-[a-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            key = name.replace("-", "_")
            if key.startswith("no_") and not equals:
                values[key.removeprefix("no_")] = False
                key = ""
            else:
                values[key] = core_scalar(value) if equals else True
                key = "" if equals else key
        elif ASSIGNMENT.fullmatch(word) and (index < position or not key):
            name, _, value = word.partition("=")
            values[name] = core_scalar(value)
        elif key:
            values[key] = _added(values[key], core_scalar(word))
        elif index > position:
            values[word] = True
    return values


def _added(value: Any, another: Any) -> Any:
    """Add one more word to an option: it had none, one or several."""
    if value is True:
        return another
    return [*value, another] if isinstance(value, list) else [value, another]
