"""Entry points of child processes: the program, and the stock trainer. Preloaded once by a fork server.

A fork after torch has started its threads deadlocks, so children come from a server that has imported everything and
computed nothing.
"""

import gc
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import qlora_train.pipeline  # noqa: F401  imported for its children
from qlora_train.cli import main
from qlora_train.export import fresh_process
from tests.faults import stock
from tests.support import fault_points

gc.collect()
gc.freeze()  # children do not scan the shared objects


def run(arguments: list[str], log: Path, environment: dict[str, str], reports: Connection) -> None:
    """Run the command line as in its own process; report its start and the number of fault points passed.

    Args:
        arguments: of `qlora-train`.
        log: receives standard output and standard error.
        environment: additions to the environment.
        reports: receives "begins", then the number of fault points if it ends by itself.
    """
    _begin(log, environment)
    fault_points.install()
    reports.send("begins")
    status = main.main(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its own process would have ended
    reports.send(fault_points.num_points())
    _end(status)


def run_stock(folder: Path, base: Path, rows: Path, log: Path, reports: Connection) -> None:
    """Train with the stock trainer, resuming from its last checkpoint; the exit status is 1 if that raises."""
    _begin(log, {})
    reports.send("begins")
    try:
        stock.train(folder, base, rows)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        _end(1)
    _end(0)


def _begin(log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
    torch.set_num_threads(1)
    fresh_process.START = "fork"  # safe with one thread; a fork server per child would import everything again


def _end(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
