"""Stops on SIGTERM, SIGINT, SIGUSR1 or `run.max_minutes`.

The first signal requests a stop. During training the stop waits for the end of the step (`stops_deferred`), where the
trainer saves and raises `Stop`; at other times the handler raises `Stop`, as for KeyboardInterrupt. The second signal ends
the process at once, from a thread: the main thread may be busy in a library. `time_limit` requests a stop in the same way.

The state is per process. Without `handle_signals` (the package used as a library) no signal requests a stop.
"""

import multiprocessing
import multiprocessing.connection
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
"""Exit statuses by signal: 128 + number, and EX_TEMPFAIL for a stop after which a job queue restarts."""
TIMEOUT_STATUS = 75
OWN_SIGNAL_SECONDS = 0.2
"""A job queue that signals every process reaches this one within this time after its parent."""
MIN_RESERVE_SECONDS = 30.0
MAX_RESERVE_SHARE = 0.1
"""Reserved before the deadline until a checkpoint is timed: 30 s, at most a tenth of the time limit."""


class Stop(BaseException):
    """Raised to stop the process; not an Exception, so that no library handles it as an error."""

    def __init__(self, cause: str, status: int) -> None:
        super().__init__(cause)
        self.cause, self.status = cause, status


class _Process:
    requested: Stop | None = None
    defers: bool = False
    started: float = 0.0
    deadline: float | None = None
    reserve_seconds: float = 0.0
    handles_signals: bool = False
    num_signals: int = 0
    forking: bool = False


_process = _Process()


def requested() -> Stop | None:
    return _process.requested


def raise_if_requested() -> None:
    if _process.requested is not None:
        raise _process.requested


@contextmanager
def stops_deferred() -> Iterator[None]:
    """Defer stops inside, where the caller checks `requested`; raise a requested `Stop` before and after."""
    raise_if_requested()
    _process.defers = True
    try:
        yield
    finally:
        _process.defers = False
    raise_if_requested()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Turn SIGTERM, SIGINT and SIGUSR1 into stops inside; call from the main thread."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    # a background job's shell ignores SIGINT; that is preserved
    handled = [number for number in STATUS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _on_signal) for number in (*handled, signal.SIGALRM)}
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    _process.handles_signals, _process.requested, _process.num_signals = True, None, 0
    _process.started, _process.deadline = time.monotonic(), None
    thread = threading.Thread(target=_end_at_second_signal, args=(receiver,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(wakeup)
        sender.close()  # ends the thread
        thread.join()
        receiver.close()
        _process.handles_signals, _process.requested, _process.deadline = False, None, None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def forwarded(send: Callable[[int], Any]) -> Iterator[None]:
    """Call `send` with the number of every signal inside, in place of a stop; a second one still ends this process."""
    handled = [number for number in STATUS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _frame: send(number)) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def receive_from_parent(number: int) -> None:
    """Handle a signal that the parent process received, unless this process receives one of its own."""
    time.sleep(OWN_SIGNAL_SECONDS)
    if _process.num_signals == 0:
        os.kill(os.getpid(), number)


@contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` on every Ctrl-C inside; an ignored Ctrl-C stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    wakeup = signal.set_wakeup_fd(-1)  # the thread does not count them
    before = signal.signal(signal.SIGINT, lambda _number, _frame: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


def _on_signal(number: int, _frame: Any) -> None:
    if _process.requested is None:
        timed_out = number == signal.SIGALRM
        name = "run.max_minutes" if timed_out else signal.Signals(number).name
        _process.requested = Stop(name, TIMEOUT_STATUS if timed_out else STATUS[signal.Signals(number)])
        when = "after this step" if _process.defers else "now"
        again = "" if timed_out else "; once more ends it at once"
        stderr = sys.__stderr__.fileno() if sys.__stderr__ else 2
        os.write(stderr, f"\n{name}: stopping {when}{again}\n".encode())  # print is not reentrant
    if not _process.defers and not _process.forking:
        raise _process.requested


def _end_at_second_signal(receiver: socket.socket) -> None:
    while byte := receiver.recv(1):
        _process.num_signals += byte[0] in STATUS
        if _process.num_signals == 2:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(STATUS[signal.Signals(byte[0])])


def exit_with_parent() -> None:
    """Exit this process when its parent ends: nothing else tells it that the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _reset_in_child() -> None:
    # the parent stops its workers; a Ctrl-C reaches both
    if _process.handles_signals and signal.getsignal(signal.SIGTERM) is _on_signal:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _process.handles_signals, _process.requested = False, None
    _process.forking = False


def _before_fork() -> None:
    _process.forking = True


def _after_fork() -> None:
    _process.forking = False
    if _process.requested is not None and _process.handles_signals:
        signal.setitimer(signal.ITIMER_REAL, 1e-3)  # Python ignores exceptions raised in fork hooks


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_reset_in_child)


@contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """Request a stop in time to end `minutes` after the process started; None sets no limit.

    Without `handle_signals`, time counts from here and only `seconds_left` shows it.
    """
    if minutes is None:
        yield
        return
    _process.deadline = (_process.started if _process.handles_signals else time.monotonic()) + 60 * minutes
    _process.reserve_seconds = 0.0
    reserve_time(min(MIN_RESERVE_SECONDS, MAX_RESERVE_SHARE * 60 * minutes))
    try:
        yield
    finally:
        if _process.handles_signals:
            signal.setitimer(signal.ITIMER_REAL, 0)
        else:
            _process.requested = None
        _process.deadline = None


def reserve_time(seconds: float) -> None:
    """Reserve at least this long before the deadline for the last checkpoint."""
    if _process.deadline is not None:
        _process.reserve_seconds = max(_process.reserve_seconds, seconds)
        if _process.handles_signals:
            signal.setitimer(signal.ITIMER_REAL, max(seconds_left(), 1e-3))


def seconds_left() -> float:
    """Return the seconds until `time_limit` requests a stop, or infinity."""
    if _process.deadline is None:
        return float("inf")
    return _process.deadline - _process.reserve_seconds - time.monotonic()


def request_timeout() -> None:
    """Request a stop now, because the next step would exceed the time limit."""
    request("run.max_minutes", TIMEOUT_STATUS)


def request(cause: str, status: int) -> None:
    """Request a stop, unless one is requested already."""
    if _process.requested is None:
        _process.requested = Stop(cause, status)
