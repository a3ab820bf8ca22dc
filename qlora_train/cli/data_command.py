"""`qlora-train data CONFIG`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_train.cli.libraries import prepare_libraries
from qlora_train.cli.options import ConfigFile, Offline, Overrides
from qlora_train.cli.output import print_text
from qlora_train.utils.errors import UserError

if TYPE_CHECKING:
    from qlora_train.config import RunConfig
    from qlora_train.data import PreparedData


def data(
    config: ConfigFile,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=0, metavar="N", help="Training rows to print with their loss mask")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report and these rows as JSON")] = False,
    offline: Offline = False,
) -> None:
    """Check the data and print which tokens are trained; loads no model. Exit status 2: a run would refuse the data."""
    prepare_libraries(offline=offline)
    from rich.console import Console

    from qlora_train.config import load_run_config
    from qlora_train.data.reason_counts import TooManyDroppedError
    from qlora_train.data.terminal_view import shown_rows
    from qlora_train.planning.base_and_data import inspect

    resolved, refusal = load_run_config(config, overrides or ()), None
    try:
        inspected = inspect(resolved, num_shown=show)
    except TooManyDroppedError as error:
        inspected, refusal = _usable_rows(resolved, error, num_shown=show), error
    report = inspected.report
    if as_json:
        print_text(json.dumps({"data_fingerprint": inspected.fingerprint, **report.to_json()}, indent=2))
    else:
        rows = shown_rows(report.first_rows, Console())
        findings = (f"warning: {finding.key}: {finding.text}" for finding in report.findings())
        print_text("\n".join([*([rows] if rows else []), *report.lines(), *findings]))
    if refusal is not None:
        raise refusal


def _usable_rows(config: "RunConfig", refusal: UserError, *, num_shown: int) -> "PreparedData":
    """Prepare the data without its limit of unusable rows; raise the refusal if no row is left."""
    from qlora_train.planning.base_and_data import inspect

    data = config.data.model_copy(update={"max_dropped": 1.0})
    try:
        return inspect(config.model_copy(update={"data": data}), num_shown=num_shown)
    except UserError:
        raise refusal from None
