"""Shell completion: config files, run folders, and section.key= of every setting."""

import os
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path

VARIABLE = "_QLORA_TRAIN_COMPLETE"
"""Set by the shell's completion script."""


def complete_config(incomplete: str) -> list[str]:
    """Return YAML files, and folders that may hold some."""
    return _paths(incomplete, lambda path: path.is_dir() or path.suffix in (".yaml", ".yml"))


def complete_run(incomplete: str) -> list[str]:
    """Return run folders, and folders that may hold some."""
    return _paths(incomplete, Path.is_dir)


def complete_setting(incomplete: str) -> list[tuple[str, str]]:
    """Return `section.key=` of the settings that begin so, each with the first sentence of its documentation."""
    from qlora_train.config import RunConfig

    found = []
    for section, field in RunConfig.model_fields.items():
        for key, setting in getattr(field.annotation, "model_fields", {}).items():
            name = f"{section}.{key}="
            if name.startswith(incomplete):
                sentence = " ".join((setting.description or "").split()).partition(". ")[0]
                found.append((name, sentence))
    return found


def _paths(incomplete: str, is_offered: Callable[[Path], bool]) -> list[str]:
    folder, _, name = incomplete.rpartition("/")
    start = f"{folder}/" if "/" in incomplete else ""
    try:
        entries: Iterable[Path] = sorted(Path(start or ".").iterdir())
    except OSError:
        return []
    hidden = name.startswith(".")
    shown = (path for path in entries if path.name.startswith(name) and (hidden or not path.name.startswith(".")))
    return [start + path.name + "/" * path.is_dir() for path in shown if is_offered(path)]


def insert_train(commands: Iterable[str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Complete `qlora-train CONFIG ...` as `qlora-train train CONFIG ...`, which it is short for.

    The first word counts as a config once it is complete.
    """
    words = environment.get("COMP_WORDS", environment.get("_TYPER_COMPLETE_ARGS", "")).split(" ")
    is_config = len(words) > 2 and words[1] not in commands and not words[1].startswith("-")
    if not is_config or environment.get("COMP_CWORD") == "1":
        return
    for variable in ("COMP_WORDS", "_TYPER_COMPLETE_ARGS"):
        if variable in environment:
            environment[variable] = " ".join([words[0], "train", *words[1:]])
    if "COMP_CWORD" in environment:
        environment["COMP_CWORD"] = str(int(environment["COMP_CWORD"]) + 1)
