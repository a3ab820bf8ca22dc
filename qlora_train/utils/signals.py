"""Stopping in time: what a signal or the clock asks of this process, and when it is done.

The first SIGTERM, SIGINT or SIGUSR1 asks for a stop. While a run trains, the stop waits for the end of the step
(`stops_deferred`), where the trainer saves and raises `Stop`; at any other time `Stop` is raised at once, like
KeyboardInterrupt: whatever is being written is whole or absent anyway. The second signal ends the process on the spot, from
a thread that hears it even while the main thread is deep in a library.

``run.max_minutes`` asks in the same way, early enough for what a stop takes.

Signals belong to a process, so the state here does too. Without `handle_signals`, as in a program that uses this package as
a library, nothing here ever asks for a stop.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}
"""Exit statuses by signal: 128 + number, and EX_TEMPFAIL for a stop that asks to be started again."""
STATUS_OF_CLOCK = 75
LEAST_RESERVE_SECONDS = 30.0
LARGEST_RESERVE_SHARE = 0.1
"""Kept free before the deadline until it is known how long a checkpoint takes: 30 s, of a short time a tenth."""


class Stop(BaseException):
    """The process is asked to stop and can do so now; no Exception, so that no library takes it for an error.

    Args:
        cause: what asked, for people.
        status: exit status of the process.
    """

    def __init__(self, cause: str, status: int) -> None:
        super().__init__(cause)
        self.cause, self.status = cause, status


class _Process:
    """What was asked of this process, and how it answers now."""

    requested: Stop | None = None
    waits: bool = False
    began: float = 0.0
    deadline: float | None = None
    reserve_seconds: float = 0.0
    handles: bool = False
    forks: bool = False


_process = _Process()


def requested() -> Stop | None:
    """Return the stop that was asked for, or None."""
    return _process.requested


def raise_if_requested() -> None:
    """Raise the stop that was asked for: a place at which a long piece of work can be left."""
    if _process.requested is not None:
        raise _process.requested


@contextmanager
def stops_deferred() -> Iterator[None]:
    """Let a stop wait inside until the work reaches a boundary and raises it itself; at the end it is raised.

    Raises:
        Stop: one was asked for before or meanwhile.
    """
    raise_if_requested()
    _process.waits = True
    try:
        yield
    finally:
        _process.waits = False
    raise_if_requested()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Answer SIGTERM, SIGINT and SIGUSR1 as this module says, instead of dying of them; in the main thread."""
    hears, told = socket.socketpair()
    told.setblocking(False)
    asking = [
        number for number in STATUS if signal.getsignal(number) is not signal.SIG_IGN
    ]  # as of a job in the background
    before = {number: signal.signal(number, _on_signal) for number in (*asking, signal.SIGALRM)}
    wakeup = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    _process.handles, _process.requested = True, None
    _process.began, _process.deadline = time.monotonic(), None
    thread = threading.Thread(target=_listen, args=(hears,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # the work is done; nothing is left to stop
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(wakeup)
        told.close()  # ends the thread
        thread.join()
        hears.close()
        _process.handles, _process.requested, _process.deadline = False, None, None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def on_interrupt(answer: Callable[[], None]) -> Iterator[None]:
    """Let every Ctrl-C inside call `answer` instead of ending the process; where it is ignored, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    wakeup = signal.set_wakeup_fd(-1)  # nobody counts them
    before = signal.signal(signal.SIGINT, lambda _number, _frame: answer())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


def _on_signal(number: int, _frame: Any) -> None:
    if _process.requested is None:
        timed_out = number == signal.SIGALRM
        status = STATUS_OF_CLOCK if timed_out else STATUS[signal.Signals(number)]
        _process.requested = Stop("run.max_minutes" if timed_out else signal.Signals(number).name, status)
        when = "after this step" if _process.waits else "now"
        again = "" if timed_out else "; once more ends it at once"
        line = f"\n{_process.requested.cause}: stopping {when}{again}\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())  # print may be interrupted in itself
    if not _process.waits and not _process.forks:
        raise _process.requested


def _listen(hears: socket.socket) -> None:
    """End the process at the second signal, in a thread of its own: the main thread may be busy in a library."""
    num_heard = 0
    while byte := hears.recv(1):
        if byte[0] in STATUS:
            num_heard += 1
        if num_heard == 2:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(STATUS[signal.Signals(byte[0])])


def _forget_in_child() -> None:
    """Leave stops to the parent: a worker is told by it, and a Ctrl-C reaches both."""
    if _process.handles and signal.getsignal(signal.SIGTERM) is _on_signal:
        signal.set_wakeup_fd(-1)
        for number, handler in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGUSR1, signal.SIG_IGN)):
            signal.signal(number, handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _process.handles, _process.requested = False, None
    _process.forks = False


def _before_fork() -> None:
    _process.forks = True


def _after_fork() -> None:
    """Raise a stop that was requested during the fork, a moment later: Python swallows exceptions of fork hooks."""
    _process.forks = False
    if _process.requested is not None and _process.handles:
        signal.setitimer(signal.ITIMER_REAL, 1e-3)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forget_in_child)


# --- the clock --------------------------------------------------------------------------------------------------------


@contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """Ask for a stop inside in time for the process to be gone `minutes` after it began; None never does.

    Where no signals are handled, time counts from here, and the clock is looked at between steps alone.
    """
    if minutes is None:
        yield
        return
    _process.deadline = (_process.began if _process.handles else time.monotonic()) + 60 * minutes
    _process.reserve_seconds = 0.0
    reserve_time(min(LEAST_RESERVE_SECONDS, LARGEST_RESERVE_SHARE * 60 * minutes))
    try:
        yield
    finally:
        if _process.handles:
            signal.setitimer(signal.ITIMER_REAL, 0)
        else:
            _process.requested = None
        _process.deadline = None


def reserve_time(seconds: float) -> None:
    """Keep at least this long free before the deadline, for the last checkpoint and the way out."""
    if _process.deadline is not None:
        _process.reserve_seconds = max(_process.reserve_seconds, seconds)
        if _process.handles:
            signal.setitimer(signal.ITIMER_REAL, max(seconds_left(), 1e-3))


def seconds_left() -> float:
    """Return the time until the clock asks for a stop, infinite when none is set."""
    if _process.deadline is None:
        return float("inf")
    return _process.deadline - _process.reserve_seconds - time.monotonic()


def request_timeout() -> None:
    """Ask for a stop now because what comes next would not be done in time."""
    if _process.requested is None:
        _process.requested = Stop("run.max_minutes", STATUS_OF_CLOCK)
