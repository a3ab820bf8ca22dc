"""`qlora-train chat RUN`."""

import io
import math
import sys
from typing import Annotated

import typer

from qlora_train.cli.libraries import prepare_libraries
from qlora_train.cli.options import Offline, RunPath
from qlora_train.cli.output import robust_stdout

Merged = Annotated[bool, typer.Option("--merged", help="Use the merged model, not the adapter on its 4-bit base")]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="System prompt, empty for none (default: shared by 90 % of the training rows)"),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy")]


def chat(
    run: RunPath,
    merged: Merged = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    offline: Offline = False,
) -> None:
    """Chat with a finished run; reads a terminal or a pipe."""
    if not math.isfinite(temperature):
        raise typer.BadParameter(f"--temperature: {temperature} is not a number from 0")
    prepare_libraries(offline=offline)
    from qlora_train.export.finished_run import open_finished_run
    from qlora_train.inference.chat import ChatSettings
    from qlora_train.inference.chat import chat as converse

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    with robust_stdout():
        converse(open_finished_run(run), ChatSettings(merged, max_new_tokens, temperature, system))
