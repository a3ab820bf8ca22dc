"""`qlora-train merge RUN`."""

from typing import Annotated, Literal

import typer

from qlora_train.cli.libraries import prepare_libraries
from qlora_train.cli.options import Offline, Overrides, RunPath

Device = Annotated[
    Literal["cpu"] | None,
    typer.Option(help="Merge and check in host memory, for models larger than the GPU (default: GPU)"),
]


def merge(run: RunPath, overrides: Overrides = None, device: Device = None, offline: Offline = False) -> None:
    """Merge a run's adapter into 16-bit weights; overrides apply to the export section."""
    prepare_libraries(offline=offline)
    from qlora_train.export.merging import merge_finished_run
    from qlora_train.report.write_report import try_write_report

    merge_finished_run.merge(run, overrides or (), device=device)
    try_write_report(run)
