"""A run that is asked to stop does so between two steps or in an evaluation, and resumes to the same results."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train import pipeline
from qlora_train.data.worker_pool import ordered_map
from qlora_train.runs import RunFolder
from qlora_train.training import train_loop
from qlora_train.utils import signals
from qlora_train.utils.run_events import Event, Measured, Restored, listening
from tests.support.runs import adapter_bytes, losses, make_config, metrics, train_run

ROOT = Path(__file__).parents[2]
SETTINGS = ("train.eval_steps=2", "train.save_steps=2", "train.max_steps=6")
Hook = Callable[[torch.nn.Module, Any], None]


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """Background processes ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run_with_hook(
    folder: Path, base: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch, *settings: str, name: str
) -> RunFolder:
    """Run a config, with signals handled, whose model calls `hook` before every forward pass of its steps."""
    config, train_on = make_config(folder, base, *settings, name=name), train_loop._run_steps

    def hooked(trainer: Any, *arguments: Any) -> None:
        trainer.model.register_forward_pre_hook(hook)
        train_on(trainer, *arguments)

    with monkeypatch.context() as patch, signals.handle_signals():
        patch.setattr(train_loop, "_run_steps", hooked)
        with pytest.raises(signals.Stop) as caught:
            pipeline.run(config)
    assert caught.value.status == {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75}[caught.value.cause]
    return RunFolder(Path(str(config.run.output_dir)))


def at_call(number: int, asked: signal.Signals, *, training: bool) -> Hook:
    """Return a hook that sends this process a signal in the given forward pass of training or evaluation."""
    num_calls = 0

    def hook(module: torch.nn.Module, _inputs: Any) -> None:
        nonlocal num_calls
        num_calls += module.training == training
        if num_calls == number and module.training == training:
            num_calls += 1
            os.kill(os.getpid(), asked)

    return hook


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_step_is_finished_and_saved(
    asked: signal.Signals, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train_run(tmp_path, pico_llama, *SETTINGS, name="straight")
    hook = at_call(5, asked, training=True)  # two micro-batches a step: step 3 has begun
    stopped = run_with_hook(tmp_path, pico_llama, hook, monkeypatch, *SETTINGS, name="stopped")
    assert stopped.checkpoint_steps()[-1] == 3
    assert not stopped.adapter.exists()
    resumed = train_run(tmp_path, pico_llama, *SETTINGS, name="stopped")
    assert adapter_bytes(resumed) == adapter_bytes(straight)
    assert losses(resumed) == losses(straight)


@pytest.mark.parametrize("evaluation", [1, 3])
def test_pending_evaluation_runs_before_the_next_step(
    evaluation: int, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    messages: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings = (*SETTINGS, "train.per_device_eval_batch_size=1", "train.load_best_model_at_end=true")
    straight = train_run(tmp_path, pico_llama, *settings, name="straight")
    num_eval = straight.metadata()["num_eval_rows"]  # one at a time
    hook = at_call(num_eval * (evaluation - 1) + 2, signal.SIGTERM, training=False)
    stopped = run_with_hook(tmp_path, pico_llama, hook, monkeypatch, *settings, name="stopped")
    assert stopped.checkpoint_steps()[-1] == 2 * evaluation
    assert len([line for line in metrics(stopped) if "eval_loss" in line]) == evaluation - 1
    messages.clear()
    events: list[Event] = []
    with listening(events.append):
        resumed = train_run(tmp_path, pico_llama, *settings, name="stopped")
    [first, *_] = [event for event in events if isinstance(event, Restored | Measured)]
    assert isinstance(first, Restored), "the history comes before what is new"
    assert [entry["loss"] for entry in first.history if "loss" in entry] == losses(straight)[: 2 * evaluation]
    assert adapter_bytes(resumed) == adapter_bytes(straight)
    assert evaluations(resumed) == evaluations(straight)
    lines = [record.getMessage() for record in messages.records if hasattr(record, "metrics")]
    assert "tokens/s" not in lines[0], "this process has run no step yet: it has no speed"
    assert all("s left" in line and ("tokens/s" in line) == ("  lr " in line) for line in lines[1:])
    assert (
        resumed.read_results()["training"]["taken_from_step"] == straight.read_results()["training"]["taken_from_step"]
    )


def test_early_stopping_in_a_pending_evaluation_ends_the_run(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        "train.max_steps=30", "train.eval_steps=1", "train.save_steps=1", "train.early_stopping_patience=1",
        "train.learning_rate=0.02", "train.lr_scheduler_type=constant", "train.per_device_eval_batch_size=1",
    )  # fmt: skip
    straight = train_run(tmp_path, pico_llama, *settings, name="straight")
    last = straight.checkpoint_steps()[-1]
    hook = at_call(straight.metadata()["num_eval_rows"] * (last - 1) + 2, signal.SIGTERM, training=False)
    run_with_hook(tmp_path, pico_llama, hook, monkeypatch, *settings, name="stopped")
    resumed = train_run(tmp_path, pico_llama, *settings, name="stopped")
    assert resumed.checkpoint_steps() == straight.checkpoint_steps()
    assert adapter_bytes(resumed) == adapter_bytes(straight)


def evaluations(run: RunFolder) -> list[tuple[int, float]]:
    return [(line["step"], line["eval_loss"]) for line in metrics(run) if "eval_loss" in line]


def test_changed_logging_settings_apply_from_the_resume_on(pico_llama: Path, tmp_path: Path) -> None:
    """Transformers would use the intervals of the checkpoint."""
    whole = train_run(tmp_path, pico_llama, "train.save_steps=2", "train.save_total_limit=9")
    assert whole.checkpoint_steps() == [2, 4, 6]
    (whole.adapter / "adapter_model.safetensors").unlink()
    for later in (4, 6):
        (whole.checkpoint(later) / "loop.json").unlink()
    train_run(tmp_path, pico_llama, "train.save_steps=1", "train.save_total_limit=9", "train.logging_steps=2")
    assert whole.checkpoint_steps() == [2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics(whole) if "loss" in line] == [1, 2, 4, 6]


# --- the clock --------------------------------------------------------------------------------------------------------


def test_clock_stops_a_run_in_a_program_that_handles_no_signals(pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama, "train.max_steps=5000", "train.save_steps=5000", "run.max_minutes=0.05")
    with pytest.raises(signals.Stop, match=r"run\.max_minutes"):
        pipeline.run(config)
    assert len(RunFolder(tmp_path / "run").checkpoint_steps()) == 1
    assert signals.requested() is None, "the next run is not stopped"


# --- signals outside of training --------------------------------------------------------------------------------------


def test_stop_is_raised_at_once_outside_training() -> None:
    def ask_and_work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with signals.handle_signals(), pytest.raises(signals.Stop, match="SIGTERM"):
        ask_and_work()
    assert signal.getsignal(signal.SIGTERM) is not signals._on_signal


def test_stop_that_waited_is_raised_at_the_end() -> None:
    reached = []

    def ask_and_work() -> None:
        with signals.stops_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            reached.append(signals.requested())

    with signals.handle_signals(), pytest.raises(signals.Stop, match="SIGINT"):
        ask_and_work()
    assert len(reached) == 1
    assert reached[0] is not None


STUCK = """
import os, signal, sys, time
from qlora_train.utils import signals
with signals.handle_signals(), signals.stops_deferred():
    print("ready", flush=True)
    sys.stdin.readline()
    import hashlib
    while True:
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 20_000_000)  # seconds in a library, without a look at Python
"""


def test_second_signal_ends_a_process_inside_a_library_call() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=2) == 143


def dispositions(_item: int) -> tuple[bool, bool]:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


FORKING = """
import os, signal, time
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
from qlora_train.utils import signals
with signals.handle_signals():
    try:
        if os.fork() == 0:
            os._exit(0)
        time.sleep(30)
    except signals.Stop as stop:
        print(stop.cause)
"""


def test_a_signal_in_a_fork_hook_stops_the_process_too() -> None:
    """Python prints and drops an exception raised there."""
    command = [sys.executable, "-c", FORKING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert (done.stdout, "Traceback" in done.stderr) == ("SIGTERM\n", False)


def test_workers_leave_signals_to_the_process_that_started_them() -> None:
    with signals.handle_signals():
        assert set(ordered_map(dispositions, range(4), 2)) == {(True, True)}


TOKENISING = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from qlora_train.utils import signals
from qlora_train.data.worker_pool import ordered_map
def work(item):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(0.2)
try:
    with signals.handle_signals():
        for _ in ordered_map(work, range(10_000), 2):
            pass
except signals.Stop as stop:
    sys.exit(stop.status)
"""


@pytest.mark.parametrize(("asked", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_whole_group_is_a_stop_and_no_broken_worker(asked: signal.Signals, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TOKENISING],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert len({process.stdout.readline() for _ in range(6)}) == 2
    os.killpg(process.pid, asked)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert "Traceback" not in err
