"""Several processes that train together, started by the fork server of the tests."""

import multiprocessing
import multiprocessing.connection
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from qlora_train.export import fresh_process
from qlora_train.parallel.process_group import joined
from qlora_train.utils.launcher import Worker

TIMEOUT_SECONDS = 240


def run_workers(function: Callable[..., Any], num_processes: int, folder: Path, *arguments: Any) -> list[Any]:
    """Run `function(*arguments)` in connected processes, and return the results by rank; None if a process ended.

    Args:
        function: of an importable module.
        num_processes: more than one.
        folder: empty; the processes meet in it.
        arguments: of the function.

    Raises:
        AssertionError: a process raised or hangs; the others are killed.
    """
    context: Any = multiprocessing.get_context(fresh_process.start_method())
    context.set_forkserver_preload(fresh_process.PRELOAD)
    processes, receivers = [], []
    for rank in range(num_processes):
        worker = Worker(rank, num_processes, rank, num_processes, f"file://{folder / 'rendezvous'}")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(sender, worker, function, arguments))
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    try:
        return [_answer(receiver, rank) for rank, receiver in enumerate(receivers)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(receiver: Connection, rank: int) -> Any:
    assert receiver.poll(TIMEOUT_SECONDS), f"rank {rank} hangs"
    try:
        result, error = receiver.recv()
    except EOFError:
        return None
    assert error is None, f"rank {rank}: {error}"
    return result


def _run(sender: Connection, worker: Worker, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        with joined(worker):
            sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, f"{type(error).__name__}: {error}"))
