"""The command line: picks a command, handles errors and signals. Each command imports what it needs when it runs.

Exit status: 0 done; 2 an error that the user can fix, one line per problem; 130, 143 and 75 stopped by SIGINT, SIGTERM,
and SIGUSR1 or run.max_minutes, with the work saved; 1 a bug, with its traceback.
"""

import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qlora_train import __version__
from qlora_train.cli.output import set_up_logging
from qlora_train.parallel import parent_link
from qlora_train.utils import signals
from qlora_train.utils.errors import ConfigError, ProcessGroupError, UserError, did_you_mean, explain
from qlora_train.utils.secrets import redact

COMMANDS = {
    "train": "train_command.train",
    "ray": "ray_command.ray_train",
    "check": "config_commands.check",
    "show": "config_commands.show",
    "data": "data_command.data",
    "plan": "plan_command.plan",
    "schema": "config_commands.schema",
    "new": "new_command.new",
    "convert": "convert_command.convert",
    "doctor": "doctor_command.doctor",
    "merge": "merge_command.merge",
    "export": "export_command.export",
    "eval": "eval_command.evaluate",
    "report": "report_command.report",
    "chat": "chat_command.chat",
}
"""Each command's module in this package and its function."""
CONFIG_SUFFIXES = (".yaml", ".yml")
HELP = """Fine-tune a language model with QLoRA from one YAML file.

`qlora-train CONFIG [section.key=value ...]` trains a config; `qlora-train COMMAND ...` runs another command."""
EPILOG = """\b
Override settings with section.key=value, for example train.learning_rate=1e-4 or data.train=my.jsonl.
Exit status: 0 done; 2 an error that you can fix; 130, 143, 75 stopped by Ctrl-C, by SIGTERM, by SIGUSR1 or
run.max_minutes, with a checkpoint of the last step (the same command resumes); 1 a bug."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with signals.handle_signals(), parent_link.linked():
            return _run(words)
    except signals.Stop as stop:
        command = redact(shlex.join(["qlora-train", *words]))
        _print_end([f"{stop.cause}: stopped; the same command resumes: {command}"])
        return stop.status


def _run(words: list[str]) -> int:
    set_up_logging()
    try:
        return parse_and_run(words)
    except ProcessGroupError as error:
        if parent_link.has_parent():
            parent_link.report([redact(problem) for problem in error.problems])
            return parent_link.LOST_STATUS
        problems: Sequence[str] = error.problems
    except UserError as error:
        problems = error.problems
    except typer.TyperException as error:
        problems = [f"qlora-train: error: {error.format_message().rstrip('.')}; see qlora-train --help"]
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        problems = [line]
    _print_end([redact(problem) for problem in problems])
    return 2


def _print_end(lines: Sequence[str]) -> None:
    parent_link.report(lines)
    for line in lines:
        print(line, file=sys.stderr)


def parse_and_run(words: list[str]) -> int:
    """Run the command that the words name; the first word may be a config, which is trained.

    Raises:
        ConfigError: the first word is neither a command nor a config.
        TyperException: the words do not match the command's arguments.
    """
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        _check_is_config(words[0])
        command = ["train", *words]
    else:
        command = words
    app = typer.Typer(add_completion=False, rich_markup_mode=None, help=HELP, epilog=EPILOG)
    app.callback()(_program)
    for name, target in COMMANDS.items():
        if command[:1] == [name] or not {*command[:1]} & COMMANDS.keys():  # all of them for --help only
            module, function = target.split(".")
            app.command(name)(getattr(importlib.import_module(f"qlora_train.cli.{module}"), function))
    group = typer.main.get_group(app)
    try:
        # not group.main(), which ends in silence on a broken pipe or EOF inside a command
        with group.make_context("qlora-train", command, obj=words) as context:
            return int(group.invoke(context) or 0)
    except typer.Exit as done:
        return int(done.exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qlora-train {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version")
    ] = False,
) -> None:
    """Accept the options before a command."""


def _check_is_config(word: str) -> None:
    if Path(word).suffix in CONFIG_SUFFIXES or "/" in word or Path(word).exists():
        return  # the config reader reports what is wrong with it
    hint = did_you_mean(word, list(COMMANDS)) or f"; the commands are {', '.join(COMMANDS)}"
    raise ConfigError(f"{word}: neither a command nor a config{hint}")


if __name__ == "__main__":
    sys.exit(main())
