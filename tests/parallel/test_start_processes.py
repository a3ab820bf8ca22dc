"""`qlora-train` starts the processes of a run and ends as a single process would: output, exit status, signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_train.config.writer import to_yaml
from qlora_train.parallel.start_processes import start_processes
from qlora_train.runs import RunFolder
from tests.support.runs import losses, make_config, train_run

SETTINGS = ("quantization.bnb_4bit_compute_dtype=float32", "train.adam_epsilon=1e-3", "train.eval_steps=3")
TIMEOUT_SECONDS = 240


def start(folder: Path, base: Path, *overrides: str, name: str) -> "subprocess.Popen[str]":
    """Start the program in two processes."""
    config = folder / "config.yaml"
    config.write_text(to_yaml(make_config(folder, base, *SETTINGS, "parallel.processes=2", name=name)))
    command = [sys.executable, "-m", "qlora_train.cli.main", str(config), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children_of(process: int) -> list[int]:
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def wait_for_step(run: RunFolder, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not run.checkpoint(step).is_dir():
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)


def test_the_exit_status_and_output_are_those_of_one_process(capfd: pytest.CaptureFixture[str]) -> None:
    assert start_processes(["--version"], 2) == 0
    assert capfd.readouterr().out.startswith("qlora-train ")
    assert start_processes(["no-such-command"], 3) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("no-such-command: neither a command nor a config")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_of_two_processes_stops_and_resumes_as_one_would(pico_llama: Path, tmp_path: Path) -> None:
    long = ("train.max_steps=60", "train.save_steps=1", "train.save_total_limit=2")
    process = start(tmp_path, pico_llama, *long, name="two")
    run = RunFolder(tmp_path / "two")
    wait_for_step(run, 3)
    workers = children_of(process.pid)
    assert len(workers) == 2
    process.terminate()
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 143, errors
    assert errors.count("SIGTERM: stopped; the same command resumes: qlora-train ") == 1
    assert "processes: 2 (logs of the others: " in errors
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert "step 3/60" in run.rank_log(1).read_text()

    output, errors = start(tmp_path, pico_llama, *long, name="two").communicate(timeout=TIMEOUT_SECONDS)
    assert output == f"finished: {run.path}\n", errors
    expected = train_run(tmp_path, pico_llama, *SETTINGS, *long, name="one")
    assert losses(run) == pytest.approx(losses(expected), rel=1e-4)
    assert run.passed_adapter_check()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_process_is_named_in_one_line(pico_llama: Path, tmp_path: Path) -> None:
    process = start(tmp_path, pico_llama, "train.max_steps=2000", "train.save_steps=1", name="killed")
    wait_for_step(RunFolder(tmp_path / "killed"), 1)
    assert_killed_rank_ends_the_run(process)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_process_killed_before_it_connects_is_named_too(
    number: signal.Signals, pico_llama: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, pico_llama, name="early")
    while len(children_of(process.pid)) < 2:
        time.sleep(0.01)
    assert_killed_rank_ends_the_run(process, number)


@pytest.mark.skipif(sys.platform != "linux", reason="names of network interfaces")
def test_processes_that_cannot_reach_each_other_say_so_once(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    process = start(tmp_path, pico_llama, name="apart")
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("rank ")]
    assert "cannot connect to the other processes" in line
    assert "absent0" in line


def assert_killed_rank_ends_the_run(process: "subprocess.Popen[str]", number: signal.Signals = signal.SIGKILL) -> None:
    """Kill rank 1; the program ends in time, with one line that names the signal, and a cause that it can have."""
    victim = children_of(process.pid)[1]
    os.kill(victim, number)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert time.monotonic() - killed < 30
    assert process.returncode == 128 + number
    (line,) = [line for line in errors.splitlines() if line.startswith("rank 1 ")]
    assert line.startswith(f"rank 1 (process {victim}) was killed by {number.name}")
    assert ("out of memory" in line) == (number == signal.SIGKILL)
    assert "Traceback" not in errors
