"""`--quiet`, `--verbose` and `--log-format`, which every command that logs accepts."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import typer

from qlora_train.cli.output import LogFormat, LogSettings, set_up_logging
from qlora_train.utils import run_events

PANEL = "Output"
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print warnings, errors and the result only", rich_help_panel=PANEL)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print all of what run.log has", rich_help_panel=PANEL)]
Format = Annotated[
    LogFormat, typer.Option("--log-format", help="json: one object per line, metrics as fields", rich_help_panel=PANEL)
]
OPTIONS = {"quiet": (Quiet, False), "verbose": (Verbose, False), "log_format": (Format, "text")}
"""Parameters by name: their types and defaults."""


@contextmanager
def shown_progress() -> Iterator[None]:
    """Show the progress of long work inside."""
    from qlora_train.cli.live_view import can_show_live
    from qlora_train.cli.progress_lines import ProgressBar, ProgressLines

    if not can_show_live():
        with run_events.listening(ProgressLines().receive):
            yield
        return
    bar = ProgressBar()
    try:
        with run_events.listening(bar.receive):
            yield
    finally:
        bar.stop()


def with_log_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command that also accepts the options of its log, and sets the log up before it runs."""

    @wraps(command)
    def configured(*, quiet: bool, verbose: bool, log_format: LogFormat, **arguments: Any) -> Any:
        if quiet and verbose:
            raise typer.BadParameter("give either --quiet or --verbose")
        level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
        set_up_logging(LogSettings(level, log_format))
        with shown_progress():
            return command(**arguments)

    signature = inspect.signature(command)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in OPTIONS.items()
    ]
    configured.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    return configured
