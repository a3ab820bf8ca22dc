"""Map a function over many items in worker processes, with results in order and few items in memory.

The processes are forked, so that they have the tokenizer without loading it; where fork is not available everything runs
in this process. They use neither torch nor a GPU.
"""

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from qlora_train.utils import signals
from qlora_train.utils.errors import DataError
from qlora_train.utils.num_cores import num_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

QUEUED_PER_PROCESS = 2

_function: Callable[[Any], Any] | None = None
"""In a worker process: the mapped function."""


def num_processes(wanted: int | None, num_bytes: int, *, min_bytes: int) -> int:
    """Return the number of worker processes: `data.num_proc`, or one per core from `min_bytes` of data on."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    if wanted is not None:
        return wanted
    return 1 if num_bytes < min_bytes else num_cores()


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], num_proc: int) -> Iterator[Result]:
    """Yield `function(item)` of every item, in order; an exception is raised in the position of its result.

    Args:
        function: its results and exceptions must be picklable; itself it need not be.
        items: read only as needed.
        num_proc: 1 runs everything in this process.

    Raises:
        DataError: a process was killed, as by a system that runs out of memory.
        Stop: this process was asked to stop.
    """
    if num_proc == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start, initargs=(function,)) as pool:
        queued: deque[Future[Result]] = deque()
        try:
            for future in _submitted(pool, items):
                queued.append(future)
                if len(queued) > QUEUED_PER_PROCESS * num_proc:
                    yield queued.popleft().result()
            while queued:
                yield queued.popleft().result()
        except BrokenProcessPool:
            signals.raise_if_requested()  # a signal to the process group ends the workers too
            raise DataError(
                "data: a process that tokenises was killed, probably for want of memory; set data.num_proc below "
                f"{num_proc}"
            ) from None
        finally:
            for future in queued:
                future.cancel()


def _submitted(pool: ProcessPoolExecutor, items: Iterable[Item]) -> Iterator[Future[Any]]:
    """Submit the items; an error of `items` itself becomes the last future, raised after the results before it."""
    try:
        for item in items:
            yield pool.submit(_call, item)
    except Exception as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        yield failed


def _start(function: Callable[[Any], Any]) -> None:
    global _function  # noqa: PLW0603
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process; threads do not survive a fork
    gc.freeze()  # collecting inherited objects would copy their memory
    signals.exit_with_parent()
    _function = function


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
