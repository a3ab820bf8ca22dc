"""`qlora-train CONFIG` and `qlora-train train CONFIG`."""

from typing import Annotated

import typer

from qlora_train.cli.libraries import prepare_libraries
from qlora_train.cli.options import ConfigFile, Offline, Overrides


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(metavar="auto|never|CHECKPOINT", help="Where to resume")] = "auto",
    offline: Offline = False,
) -> None:
    """Train a config, or resume its run; merge if the config asks for it."""
    from qlora_train.config import load_run_config

    resolved = load_run_config(config, overrides or ())
    prepare_libraries(offline=offline)
    from qlora_train.pipeline import run

    print(f"finished: {run(resolved, resume=resume).path}")
