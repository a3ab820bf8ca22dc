"""`qlora-train report RUN [RUN ...]`."""

from pathlib import Path
from typing import Annotated

import typer

from qlora_train.cli.output import print_text
from qlora_train.utils.errors import ConfigError

Runs = Annotated[list[Path], typer.Argument(metavar="RUN [RUN ...]", help="Run folders; several are compared")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="HTML file (RUN/report.html, or comparison.html)")
]


def report(runs: Runs, output: Output = None) -> None:
    """Write one HTML page about a run, or about several side by side; it needs no network."""
    from qlora_train.report.write_report import write_comparison, write_report

    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: the folder {output.parent} does not exist; create it, or choose another")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("report: the same run is named twice; name each once")
    file = write_report(runs[0], output) if len(runs) == 1 else write_comparison(runs, output)
    print_text(f"report: {file}")
