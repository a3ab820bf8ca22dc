"""Arguments, options and checks that several commands share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_train.cli.completion import complete_config, complete_run, complete_setting
from qlora_train.utils.errors import ConfigError

ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="YAML file, for example configs/llama7b.yaml", autocompletion=complete_config
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Overrides of the config", autocompletion=complete_setting),
]
RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Run folder, for example runs/llama7b", autocompletion=complete_run),
]
Offline = Annotated[bool, typer.Option("--offline", help="Do not use the network; same as HF_HUB_OFFLINE=1")]


def refuse_unused(options: Mapping[str, Any], why: str) -> None:
    """Raise a ConfigError for each option that is set and would have no effect."""
    if given := [option for option, value in options.items() if value is not None and value is not False]:
        raise ConfigError([f"{option}: {why}" for option in given])


def comma_list(text: str) -> tuple[str, ...]:
    """Split `a,b` and drop repetitions."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise typer.BadParameter(f"{text!r} is not a list of names separated by commas")
    return names


def setting_hint(error: typer.TyperException) -> str | None:
    """Return how to write a setting that was given as an option, such as `--learning_rate`; None for other errors."""
    from qlora_train.config.unknown_keys import where_it_is

    name = str(getattr(error, "option_name", None) or "").lstrip("-").replace("-", "_")
    where = where_it_is(name) if name else None
    return f"settings are overrides without dashes, section.key=value: {where}" if where else None
