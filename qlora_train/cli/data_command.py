"""`qlora-train data CONFIG`."""

import json
from typing import Annotated

import typer

from qlora_train.cli.libraries import prepare_libraries
from qlora_train.cli.options import ConfigFile, Offline, Overrides
from qlora_train.cli.output import print_text


def data(
    config: ConfigFile,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=0, metavar="N", help="Training rows to print with their loss mask")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report and these rows as JSON")] = False,
    offline: Offline = False,
) -> None:
    """Check the data and print which tokens are trained; loads no model."""
    prepare_libraries(offline=offline)
    from rich.console import Console

    from qlora_train.config import load_run_config
    from qlora_train.data.terminal_view import shown_rows
    from qlora_train.planning.base_and_data import inspect

    inspected = inspect(load_run_config(config, overrides or ()), num_shown=show)
    report = inspected.report
    if as_json:
        print_text(json.dumps({"data_fingerprint": inspected.fingerprint, **report.to_json()}, indent=2))
        return
    rows = shown_rows(report.first_rows, Console())
    findings = (f"warning: {finding.key}: {finding.text}" for finding in report.findings())
    print_text("\n".join([*([rows] if rows else []), *report.lines(), *findings]))
