"""Start the processes of a run on this machine, wait for them, and end as a single process would.

Plain subprocesses: torch's elastic agent kills workers 30 s after a signal, too early for the checkpoint of a large model,
and replaces their exit statuses. Rank 0 has this process's standard output and error; what the others write is shown if
they crash.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_train.parallel.parent_link import LOST_STATUS, PIPE, REPORT
from qlora_train.utils import signals
from qlora_train.utils.launcher import RENDEZVOUS
from qlora_train.utils.num_cores import num_cores

GRACE_SECONDS, STOP_GRACE_SECONDS = 10.0, 60.0
"""Time for the others to end by themselves after one has failed, or has stopped as all do."""
POLL_SECONDS = 0.05
SHOWN_LINES = 40
CRASH_SIGNALS = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
STOP_STATUSES = {*signals.STATUS.values(), signals.TIMEOUT_STATUS}


@dataclass
class Process:
    """A started process; `was_killed`: by this one, because another had failed."""

    rank: int
    popen: subprocess.Popen[bytes]
    pipe: int
    report: Path
    output: Path
    was_killed: bool = False

    @property
    def status(self) -> int | None:
        """Exit status; negative for a signal, None while it runs."""
        return self.popen.poll()


def start_processes(words: Sequence[str], num_processes: int) -> int:
    """Run `qlora-train` with these arguments in several processes, and return the exit status of the run."""
    with tempfile.TemporaryDirectory(prefix="qlora-train-") as folder, ExitStack() as stack:
        processes = [
            stack.enter_context(_started(words, rank, num_processes, Path(folder))) for rank in range(num_processes)
        ]
        with signals.forwarded(lambda number: _forward(number, processes)):
            failures = _wait(processes)
        return _report(failures)


@contextmanager
def _started(words: Sequence[str], rank: int, num_processes: int, folder: Path) -> Iterator[Process]:
    reader, writer = os.pipe()
    report, output = folder / f"rank-{rank}.json", folder / f"rank-{rank}.log"
    environment = {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes), RENDEZVOUS: f"file://{folder / 'rendezvous'}",
        PIPE: str(reader), REPORT: str(report),
    }  # fmt: skip
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    with output.open("wb") as log:
        own = None if rank == 0 else log
        # in a session of its own: Ctrl-C reaches this process, which forwards it once
        popen = subprocess.Popen(
            [*_python(), "-m", "qlora_train.cli.main", *words], env=environment, pass_fds=[reader],
            stdout=own, stderr=own, start_new_session=True,
        )  # fmt: skip
    os.close(reader)
    try:
        yield Process(rank, popen, writer, report, output)
    finally:
        os.close(writer)  # ends the process if it still runs
        popen.wait()


def _python() -> list[str]:
    """Return this Python; files of the working directory must not hide libraries, unless they do so here."""
    searches_working_directory = not {"", str(Path.cwd())}.isdisjoint(sys.path)
    return [sys.executable] if searches_working_directory else [sys.executable, "-P"]


def _forward(number: int, processes: Sequence[Process]) -> None:
    for process in processes:
        if process.status is None:
            with suppress(BrokenPipeError):  # it is just ending
                os.write(process.pipe, bytes([number]))


def _wait(processes: Sequence[Process]) -> list[Process]:
    """Wait until all have ended, and return those that failed, the first first; kill what hangs after a failure."""
    failures: list[Process] = []
    deadline = float("inf")
    while any(process.status is None for process in processes):
        time.sleep(POLL_SECONDS)
        failures += [process for process in processes if process.status and process not in failures]
        if failures and deadline == float("inf"):
            stopped = failures[0].status in STOP_STATUSES
            deadline = time.monotonic() + (STOP_GRACE_SECONDS if stopped else GRACE_SECONDS)
        if time.monotonic() > deadline:
            for process in processes:
                if process.status is None:
                    process.was_killed = True
                    process.popen.kill()
            deadline = float("inf")
    return failures + [process for process in processes if process.status and process not in failures]


def _report(failures: Sequence[Process]) -> int:
    """Print why the run ended, unless rank 0 did, and return its exit status."""
    causes = [process for process in failures if process.status != LOST_STATUS and not process.was_killed]
    if not causes:
        return _report_lost(failures) if failures else 0
    # every rank may have found the same error
    cause = min(causes, key=lambda process: process.rank) if _all_reported(causes) else causes[0]
    status = cause.status
    assert status is not None
    if status < 0:
        _report_signal(cause, -status)
        return 128 - status
    if cause.rank != 0:
        print("\n".join(_lines_of(cause)), file=sys.stderr)
    return status


def _report_signal(cause: Process, number: int) -> None:
    """Print which signal ended a process; NCCL and CUDA end it themselves, after messages of their own."""
    crashed = number in CRASH_SIGNALS
    if crashed and cause.rank != 0:
        print("\n".join(_lines_of(cause)), file=sys.stderr)
    reason = "; its own messages say why" if crashed else ", as by a system that runs out of memory"
    print(
        f"rank {cause.rank} (process {cause.popen.pid}) was killed by {signal.Signals(number).name}{reason}; complete "
        "files are intact, and the same command resumes",
        file=sys.stderr,
    )


def _report_lost(failures: Sequence[Process]) -> int:
    """Print what the first process saw, where no process failed by itself but their connections did."""
    print("\n".join(_lines_of(failures[0])), file=sys.stderr)
    return 2


def _all_reported(causes: Sequence[Process]) -> bool:
    return all(cause.report.exists() for cause in causes)


def _lines_of(process: Process) -> list[str]:
    """Return the lines that a process ended with; those of a crash are the end of its output."""
    if process.report.exists():
        lines: list[str] = json.loads(process.report.read_text(encoding="utf-8"))
        return lines
    output = process.output.read_text(encoding="utf-8", errors="replace").splitlines()
    return [f"rank {process.rank}:", *output[-SHOWN_LINES:]]
