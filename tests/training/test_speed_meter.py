"""Speed and memory of log lines: optimizer steps alone count, and a resumed run starts anew."""

from types import SimpleNamespace

import pytest
import torch

from qlora_train.training import run_clock
from qlora_train.training.flops_utilization import ModelFlops, Utilization
from qlora_train.training.run_clock import RunClock
from qlora_train.training.speed_meter import SpeedMeter, peak_memory_bytes
from qlora_train.training.step_end import Schedule


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(run_clock.time, "perf_counter", lambda: clock.now)
    return clock


def take_step(timed: RunClock, clock: SimpleNamespace, seconds: float) -> None:
    timed.on_step_begin(None, None, None)
    clock.now += seconds
    timed.on_step_end(None, None, None)


def test_time_between_steps_does_not_count(clock: SimpleNamespace) -> None:
    timed = RunClock()
    meter = SpeedMeter(timed)
    meter.on_train_begin(None, SimpleNamespace(num_input_tokens_seen=1000), None)  # resumed
    take_step(timed, clock, 2.0)
    clock.now += 500  # an evaluation and a checkpoint
    take_step(timed, clock, 3.0)
    assert meter.take(1400)["tokens_per_second"] == 400 / 5
    take_step(timed, clock, 1.0)
    assert meter.take(1450)["tokens_per_second"] == 50


def test_mfu_is_that_of_the_steps_since_the_last_line(clock: SimpleNamespace) -> None:
    # 6 operations per token and 4 per label, of 1000 per second
    timed = RunClock()
    meter = SpeedMeter(timed, Utilization(ModelFlops(per_token=6.0, per_label=4.0), peak=1000.0))
    meter.on_train_begin(None, SimpleNamespace(num_input_tokens_seen=0), None)
    for seconds in (2.0, 3.0):
        take_step(timed, clock, seconds)
        meter.count_labels(50)
    assert meter.take(200)["mfu"] == (6 * 200 + 4 * 100) / (1000 * 5)
    take_step(timed, clock, 1.0)
    assert meter.take(300)["mfu"] == 6 * 100 / 1000, "labels of earlier lines do not count again"


def test_mfu_is_left_out_where_it_is_unknown(clock: SimpleNamespace) -> None:
    assert "mfu" not in SpeedMeter(RunClock()).take(1)


def test_time_left_counts_evaluations_and_checkpoints_that_are_due_but_not_in_the_step_rate(
    clock: SimpleNamespace,
) -> None:
    """Steps of 2 s; after every second one an evaluation of 10 s, of which 7 s are samples; a checkpoint of 3 s after 4."""
    timed = RunClock()
    timed.schedule = Schedule(7, None, 1, eval_steps=2, save_steps=4, has_eval=True, patience=None)
    timed.on_train_begin(None, SimpleNamespace(global_step=0, num_input_tokens_seen=0), None)
    assert timed.seconds_left(0) is None
    left = {}
    for step in range(1, 8):
        take_step(timed, clock, 2.0)
        left[step] = timed.seconds_left(step)
        if step in (2, 4, 6, 7):
            with timed.evaluation():
                clock.now += 3.0
                left[step, "evaluated"] = timed.seconds_left(step)
                clock.now += 7.0
        if step in (4, 7):
            with timed.saving():
                clock.now += 3.0
    assert left == {
        1: 6 * 2, 2: 5 * 2,  # no evaluation yet
        (2, "evaluated"): 5 * 2 + 3 * 3,  # three more as long as this one is so far
        3: 4 * 2 + 3 * 10, 4: 3 * 2 + 3 * 10, (4, "evaluated"): 3 * 2 + 3 * 10 - 3,  # no checkpoint yet
        5: 2 * 2 + 2 * 10 + 3, 6: 1 * 2 + 2 * 10 + 3, (6, "evaluated"): 1 * 2 + 2 * 10 - 3 + 3,
        7: 10 + 3, (7, "evaluated"): 7 + 3,
    }  # fmt: skip
    assert timed.state() == {
        "train_seconds": 7 * 2 + 4 * 10 + 2 * 3, "step_seconds": 14.0, "evaluation_seconds": 40.0, "save_seconds": 6.0,
        "num_evaluations": 4, "num_saves": 2,
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the peak is that of the GPU")
def test_peak_memory_grows_by_what_is_allocated() -> None:
    num_bytes = 300_000_000
    before = peak_memory_bytes()
    held = torch.ones(num_bytes // 4)
    after = peak_memory_bytes()
    assert after >= before
    assert after >= held.nbytes
    del held
    assert peak_memory_bytes() == after
