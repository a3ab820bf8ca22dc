"""Speed and memory of log lines: optimizer steps alone count, and a resumed run starts anew."""

from types import SimpleNamespace

import pytest
import torch

from qlora_train.training import speed_meter
from qlora_train.training.flops_utilization import ModelFlops, Utilization
from qlora_train.training.speed_meter import SpeedMeter, peak_memory_bytes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(speed_meter.time, "perf_counter", lambda: clock.now)
    return clock


def take_step(meter: SpeedMeter, clock: SimpleNamespace, seconds: float) -> None:
    meter.on_step_begin(None, None, None)
    clock.now += seconds
    meter.on_step_end(None, None, None)


def test_time_between_steps_does_not_count(clock: SimpleNamespace) -> None:
    meter = SpeedMeter()
    meter.on_train_begin(None, SimpleNamespace(num_input_tokens_seen=1000), None)  # resumed
    take_step(meter, clock, 2.0)
    clock.now += 500  # an evaluation and a checkpoint
    take_step(meter, clock, 3.0)
    assert meter.take(1400)["tokens_per_second"] == 400 / 5
    take_step(meter, clock, 1.0)
    assert meter.take(1450)["tokens_per_second"] == 50


def test_mfu_is_that_of_the_steps_since_the_last_line(clock: SimpleNamespace) -> None:
    # 6 operations per token and 4 per label, of 1000 per second
    meter = SpeedMeter(Utilization(ModelFlops(per_token=6.0, per_label=4.0), peak=1000.0))
    meter.on_train_begin(None, SimpleNamespace(num_input_tokens_seen=0), None)
    for seconds in (2.0, 3.0):
        take_step(meter, clock, seconds)
        meter.count_labels(50)
    assert meter.take(200)["mfu"] == (6 * 200 + 4 * 100) / (1000 * 5)
    take_step(meter, clock, 1.0)
    assert meter.take(300)["mfu"] == 6 * 100 / 1000, "labels of earlier lines do not count again"


def test_mfu_is_left_out_where_it_is_unknown(clock: SimpleNamespace) -> None:
    assert "mfu" not in SpeedMeter().take(1)


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
