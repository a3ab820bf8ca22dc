"""A program that this process starts ends with it, and never hangs it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_train.utils import signals
from qlora_train.utils.watched_process import run_watched

CODE = "import sys, time, os\n"


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", CODE + code]


def test_status_and_lines_of_both_streams_are_returned() -> None:
    done = run_watched(python("print('one'); print('two', file=sys.stderr); sys.exit(3)"), max_silent_seconds=60)
    assert (done.status, done.lines, done.has_failed) == (3, ("one", "two"), True)
    assert done.problem() == "failed with status 3: two"
    assert not run_watched(
        python("print('é', os.environ['A'])"), environment={"A": "b"}, max_silent_seconds=60
    ).has_failed


def test_lines_are_passed_on_as_they_come_and_the_last_ones_are_kept() -> None:
    seen: list[str] = []
    done = run_watched(python("[print(i) for i in range(900)]"), max_silent_seconds=60, on_line=seen.append)
    assert len(seen) == 900
    assert done.lines[0] == "400"
    assert done.lines[-1] == "899"


def test_program_that_prints_nothing_is_stopped() -> None:
    began = time.monotonic()
    done = run_watched(python("print('here'); time.sleep(600)"), max_silent_seconds=0.5)
    assert time.monotonic() - began < 60
    assert done.has_failed
    assert done.problem() == "printed nothing for 0.5 seconds and was stopped"


def test_program_that_prints_at_intervals_is_not_stopped() -> None:
    code = "for _ in range(8):\n    print('x')\n    time.sleep(0.25)"
    assert not run_watched(python(code), max_silent_seconds=1.5).has_failed


def test_input_is_at_its_end_or_stays_open() -> None:
    assert run_watched(python("print(repr(sys.stdin.read()))"), max_silent_seconds=60).lines == ("''",)
    assert (
        run_watched(python("sys.stdin.read()"), max_silent_seconds=0.5, open_input=True)
        .problem()
        .endswith("was stopped")
    )


def test_signal_of_the_system_is_named() -> None:
    done = run_watched(python("os.kill(os.getpid(), 9)"), max_silent_seconds=60)
    assert done.problem() == "was ended by signal 9, as by a system that runs out of memory"


def test_stop_of_this_process_ends_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    monkeypatch.setattr(signals._process, "requested", None)

    def stop(_line: str) -> None:
        signals._process.requested = signals.Stop("SIGTERM", 143)

    code = f"open({str(file)!r}, 'w').write(str(os.getpid())); print('running'); time.sleep(600)"
    with pytest.raises(signals.Stop):
        run_watched(python(code), max_silent_seconds=60, on_line=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, time\nfrom qlora_train.export.gguf.llama_worker import _exit_with_parent\n"
        f"_exit_with_parent()\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    parent = (
        "from qlora_train.utils.watched_process import run_watched\n"
        f"run_watched([{sys.executable!r}, {str(worker)!r}], max_silent_seconds=600, open_input=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    pid = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
