"""A function over many items in several processes, results in the order of the items, with little in memory at once.

The processes are forked, so that they have the tokenizer without loading it; where there is no fork everything runs in
this process. They use neither torch nor a GPU.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from qlora_train.utils import signals
from qlora_train.utils.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Items that wait for each process."""

_function: Callable[[Any], Any] | None = None
"""In a worker process: what it was started for."""


def num_processes(wanted: int | None, num_bytes: int, *, worth_bytes: int) -> int:
    """Return how many processes to use: what is wanted, or one a core that this process may use.

    Args:
        wanted: `data.num_proc`.
        num_bytes: size of all items.
        worth_bytes: below this size starting processes takes longer than they save.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    if wanted is not None:
        return wanted
    return 1 if num_bytes < worth_bytes else num_cores()


def num_cores() -> int:
    """Return the cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], num_proc: int) -> Iterator[Result]:
    """Yield `function(item)` of every item, in order; an exception is raised where its result would come.

    Args:
        function: its results and exceptions must be picklable; itself it need not be.
        items: read as they are needed.
        num_proc: 1 runs everything in this process.

    Raises:
        DataError: a process was killed, as a system does that runs out of memory.
        Stop: this process was asked to stop.
    """
    if num_proc == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start, initargs=(function,)) as pool:
        waiting: deque[Future[Result]] = deque()
        reading = _Reading(items)
        try:
            for item in reading:
                waiting.append(pool.submit(_call, item))
                if len(waiting) > AHEAD * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
            reading.finish()
        except BrokenProcessPool:
            signals.raise_if_requested()  # a signal to the whole group ends the workers too
            raise DataError(
                "data: a process that tokenises was killed, probably for want of memory; set data.num_proc below "
                f"{num_proc}"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


class _Reading(Iterator[Item]):
    """Items until there are no more or one cannot be had; that error waits until the results before it are out."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._error: Exception | None = None

    def __next__(self) -> Item:
        try:
            return next(self._items)
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise StopIteration from None

    def finish(self) -> None:
        """Raise the error that ended the items, if one did."""
        if self._error is not None:
            raise self._error


def _start(function: Callable[[Any], Any]) -> None:
    global _function  # noqa: PLW0603
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process; threads do not survive a fork
    gc.freeze()  # what was inherited is not looked through again and stays shared
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = function


def _end_with_parent() -> None:
    """End this process when its parent has gone, killed ones included: nobody else would tell it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
