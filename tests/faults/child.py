"""What runs in a child process: the program itself, and the stock trainer beside it. Preloaded once by a fork server.

A fork after torch has started its threads deadlocks, so that children come from a server which has imported everything and
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
from qlora_train.utils import fault_injection
from tests.faults import stock

gc.collect()
gc.freeze()  # what every child shares is not looked through in each of them


def run(arguments: list[str], log: Path, environment: dict[str, str], told: Connection) -> None:
    """Run the command line as a process of its own would, and say when it begins and how many points it came by.

    Args:
        arguments: of `qlora-train`.
        log: gets standard output and standard error.
        environment: additions to the environment.
        told: gets "begins", then the number of fault points when it ends by itself.
    """
    _begin(log, environment)
    told.send("begins")
    status = main.main(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a process of its own would be gone
    told.send(fault_injection.passed())
    _end(status)


def run_stock(folder: Path, base: Path, rows: Path, log: Path, told: Connection) -> None:
    """Train with the stock trainer, going on from its last checkpoint; the exit status is 1 when that raises."""
    _begin(log, {})
    told.send("begins")
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background would ignore it
    torch.set_num_threads(1)
    fresh_process.START = "fork"  # with one thread it may; a server of its own would import everything for every child


def _end(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
