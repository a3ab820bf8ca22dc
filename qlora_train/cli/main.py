"""The command line: picks a command, handles errors and signals. Each command imports what it needs when it runs.

Exit status: 0 done; 2 an error that the user can fix, one line per problem; 130, 143 and 75 stopped by SIGINT, SIGTERM,
and SIGUSR1 or run.max_minutes, with the work saved; 1 a bug, with its traceback.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.completion import completion_init  # type: ignore[attr-defined]

from qlora_train.cli import completion
from qlora_train.cli.flag_help import PlainCommand, PlainGroup
from qlora_train.cli.guide import GUIDE, version_lines
from qlora_train.cli.log_options import with_log_options
from qlora_train.cli.options import setting_hint
from qlora_train.cli.output import command_text, has_reader, print_errors, print_text, set_up_logging
from qlora_train.parallel import parent_link
from qlora_train.utils import signals
from qlora_train.utils.errors import ConfigError, ProcessGroupError, UserError, did_you_mean, explain
from qlora_train.utils.secrets import redact


@dataclass(frozen=True)
class Command:
    """A command: its module in this package and its function, its group in `--help`, and whether it has a log."""

    target: str
    group: str
    logs: bool = True


BEFORE, DURING, AFTER = "Before a run", "A run", "After a run"
COMMANDS = {
    "new": Command("new_command.new", BEFORE, logs=False),
    "convert": Command("convert_command.convert", BEFORE, logs=False),
    "check": Command("config_commands.check", BEFORE, logs=False),
    "show": Command("config_commands.show", BEFORE, logs=False),
    "schema": Command("config_commands.schema", BEFORE, logs=False),
    "data": Command("data_command.data", BEFORE),
    "plan": Command("plan_command.plan", BEFORE, logs=False),
    "doctor": Command("doctor_command.doctor", BEFORE, logs=False),
    "train": Command("train_command.train", DURING),
    "ray": Command("ray_command.ray_train", DURING),
    "merge": Command("merge_command.merge", AFTER),
    "export": Command("export_command.export", AFTER),
    "eval": Command("eval_command.evaluate", AFTER),
    "report": Command("report_command.report", AFTER, logs=False),
    "chat": Command("chat_command.chat", AFTER),
}
CONFIG_SUFFIXES = (".yaml", ".yml")
HELP = """Fine-tune a language model with QLoRA from one YAML file.

`qlora-train CONFIG \\[section.key=value ...]` trains a config; `qlora-train COMMAND ...` runs another command."""
EPILOG = (
    "Override settings with section.key=value, for example train.learning_rate=1e-4 or data.train=my.jsonl.\n\n"
    "Exit status: 0 done; 2 an error that you can fix; 130, 143, 75 stopped by Ctrl-C, by SIGTERM, by SIGUSR1 or "
    "run.max_minutes, with a checkpoint of the last step (the same command resumes); 1 a bug."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with signals.handle_signals(), parent_link.linked():
            return _run(words)
    except signals.Stop as stop:
        _print_end([f"{stop.cause}: stopped; the same command resumes: {command_text(words)}"])
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
        message = error.format_message().rstrip(".")
        problems = [f"qlora-train: error: {message}; {setting_hint(error) or 'see qlora-train --help'}"]
    except BrokenPipeError:
        if has_reader():
            raise  # the pipe of a process of ours
        return 0
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        problems = [line]
    _print_end([redact(problem) for problem in problems])
    return 2


def _print_end(lines: Sequence[str]) -> None:
    parent_link.report(lines)
    print_errors(lines)


def parse_and_run(words: list[str]) -> int:
    """Run the command that the words name; the first word may be a config, which is trained.

    Raises:
        ConfigError: the first word is neither a command nor a config.
        TyperException: the words do not match the command's arguments.
    """
    completes = completion.VARIABLE in os.environ
    if not words and not completes:
        print_text(GUIDE.rstrip())
        return 0
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        _check_is_config(words[0])
        command = ["train", *words]
    else:
        command = words
    app = typer.Typer(cls=PlainGroup, rich_markup_mode="rich", help=HELP, epilog=EPILOG)
    app.callback()(_program)
    for name, row in COMMANDS.items():
        if command[:1] == [name] or not {*command[:1]} & COMMANDS.keys():  # all of them for --help only
            app.command(name, cls=PlainCommand, rich_help_panel=row.group)(_function(row))
    group = typer.main.get_command(app)
    if completes:
        completion_init()
        completion.insert_train(COMMANDS)
        group.main(prog_name="qlora-train")  # prints the words for the shell, and exits
    try:
        # not group.main(), which ends in silence on a broken pipe or EOF inside a command
        with group.make_context("qlora-train", command, obj=words) as context:
            return int(group.invoke(context) or 0)
    except typer.Exit as done:
        return int(done.exit_code)


def _function(row: Command) -> Callable[..., Any]:
    module, name = row.target.split(".")
    function: Callable[..., Any] = getattr(importlib.import_module(f"qlora_train.cli.{module}"), name)
    return with_log_options(function) if row.logs else function


def _print_version(wanted: bool) -> None:
    if wanted:
        print_text("\n".join(version_lines()))
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the versions of the stack")
]


def _program(version: Version = False) -> None:
    """Accept the options before a command."""


def _check_is_config(word: str) -> None:
    if Path(word).suffix in CONFIG_SUFFIXES or "/" in word or Path(word).exists():
        return  # the config reader reports what is wrong with it
    hint = did_you_mean(word, list(COMMANDS)) or f"; the commands are {', '.join(COMMANDS)}"
    raise ConfigError(f"{word}: neither a command nor a config{hint}")


if __name__ == "__main__":
    sys.exit(main())
