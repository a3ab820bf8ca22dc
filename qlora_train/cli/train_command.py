"""`qlora-train CONFIG` and `qlora-train train CONFIG`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer

from qlora_train.cli.libraries import prepare_libraries
from qlora_train.cli.options import ConfigFile, Offline, Overrides
from qlora_train.cli.output import command_text, silence_console
from qlora_train.utils import launcher


def train(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(metavar="auto|never|CHECKPOINT", help="Where to resume")] = "auto",
    offline: Offline = False,
) -> int:
    """Train a config, or resume its run; merge if the config asks for it."""
    from qlora_train.config import load_run_config
    from qlora_train.parallel.num_processes import check_launched_processes, choose_num_processes

    resolved = load_run_config(config, overrides or ())
    worker = launcher.take_worker()
    if worker is not None:
        check_launched_processes(resolved, worker)
    elif (num_processes := choose_num_processes(resolved)) > 1:
        from qlora_train.parallel.start_processes import start_processes

        return start_processes(context.obj, num_processes)
    rank = 0 if worker is None else worker.rank
    if rank:
        silence_console()  # what it logs is held back for the file of its rank
    prepare_libraries(offline=offline, local_rank=0 if worker is None else worker.local_rank)
    from qlora_train.cli.live_view import shown_live
    from qlora_train.pipeline import run

    with _joined(worker), shown_live() if rank == 0 else nullcontext():
        folder = run(resolved, resume=resume, command=command_text(context.obj))
    if rank == 0:
        print(f"finished: {folder.path}")
    return 0


def _joined(worker: launcher.Worker | None) -> AbstractContextManager[Any]:
    if worker is None:
        return nullcontext()
    from qlora_train.parallel.process_group import joined

    return joined(worker)
