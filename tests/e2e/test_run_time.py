"""The time of a run that was stopped and resumed: all parts count, and steps are apart from samples and evaluations."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train import pipeline
from qlora_train.cli.main import main
from qlora_train.planning.plan_device import cpu_name
from qlora_train.planning.run_history import earlier_runs
from qlora_train.report.number_text import number_text
from qlora_train.report.recorded_run import read_run
from qlora_train.report.run_facts import figures_of
from qlora_train.runs import RunFolder
from qlora_train.training import held_out_samples, train_loop
from qlora_train.utils import signals
from qlora_train.utils.run_events import Event, Measured, listening
from tests.support.runs import make_config, metrics

SETTINGS = ("train.eval_steps=2", "train.save_steps=2", "train.max_steps=6", "run.samples=1")
STEP_DELAY, SAMPLE_DELAY = 0.2, 0.75
"""Added seconds: per micro-batch of the first part, and per evaluation of both parts."""
STOPPED_CALL = 5


def slow_hook() -> Callable[[torch.nn.Module, Any], None]:
    """Return a hook that waits in micro-batches, two a step, and stops this process in the third step."""
    num_calls = 0

    def hook(module: torch.nn.Module, _inputs: Any) -> None:
        nonlocal num_calls
        if module.training:
            num_calls += 1
            time.sleep(STEP_DELAY)
            if num_calls == STOPPED_CALL:
                os.kill(os.getpid(), signal.SIGTERM)

    return hook


@pytest.fixture(scope="module")
def resumed(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[Measured]]:
    """A run that was stopped after step 3 and resumed, and the log points of its second part."""
    config = make_config(tmp_path_factory.mktemp("runs"), pico_llama, *SETTINGS)
    generate, run_steps = held_out_samples.generate_answers, train_loop._run_steps

    def slow_answers(*arguments: Any, **keywords: Any) -> list[str]:
        time.sleep(SAMPLE_DELAY)
        return generate(*arguments, **keywords)

    def run_slow_steps(trainer: Any, *arguments: Any) -> None:
        trainer.model.register_forward_pre_hook(slow_hook())
        run_steps(trainer, *arguments)

    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out_samples, "generate_answers", slow_answers)
        with pytest.MonkeyPatch.context() as first, signals.handle_signals():
            first.setattr(train_loop, "_run_steps", run_slow_steps)
            with pytest.raises(signals.Stop):
                pipeline.run(config)
        with listening(events.append):
            run = pipeline.run(config)
    assert run.read_results()["training"]["since_last_start"]["num_steps"] == 3
    return run, [event for event in events if isinstance(event, Measured)]


def test_time_is_that_of_all_parts(resumed: tuple[RunFolder, list[Measured]]) -> None:
    training = resumed[0].read_results()["training"]
    slow_steps = STEP_DELAY * 2 * 3
    assert training["step_seconds"] >= slow_steps, "the steps before the stop count"
    assert training["train_seconds"] >= training["since_last_start"]["train_seconds"] + slow_steps
    assert training["train_seconds"] >= training["step_seconds"] + 3 * SAMPLE_DELAY, "samples are not in the steps"


def test_speed_of_log_lines_is_that_of_steps_alone(resumed: tuple[RunFolder, list[Measured]]) -> None:
    """Step 5 follows the samples of step 4."""
    run, _ = resumed
    speed = {line["step"]: line["tokens_per_second"] for line in metrics(run) if "tokens_per_second" in line}
    num_tokens = run.read_results()["training"]["num_tokens"] / 6
    assert speed[5] > 1.5 * num_tokens / SAMPLE_DELAY
    assert max(speed[step] for step in (1, 2, 3)) < 2 * num_tokens / (2 * STEP_DELAY)


def test_time_left_has_the_samples_to_come(resumed: tuple[RunFolder, list[Measured]]) -> None:
    left = {event.step: event.seconds_left for event in resumed[1] if "loss" in event.values}
    assert left[4] is not None
    assert left[5] is not None
    assert left[4] >= 2 * SAMPLE_DELAY, "the evaluations after steps 4 and 6"
    assert left[5] >= SAMPLE_DELAY, "that after step 6"


def test_report_is_about_the_whole_run(resumed: tuple[RunFolder, list[Measured]]) -> None:
    training = resumed[0].read_results()["training"]
    [figure] = [each for each in figures_of(read_run(resumed[0].path)) if each.label == "Training time"]
    assert figure.value == number_text(training["train_seconds"], "seconds")
    speed = number_text(training["num_tokens"] / training["step_seconds"])
    assert figure.note == f"optimizer steps {number_text(training['step_seconds'], 'seconds')}, {speed} tokens/s"


def test_later_plans_use_its_time(
    resumed: tuple[RunFolder, list[Measured]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = resumed
    [earlier] = earlier_runs(run.path.parent, cpu_name())
    assert earlier.seconds == run.read_results()["training"]["step_seconds"]
    assert main(["plan", str(run.config_file)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"steps 6, [\d,]+ tokens, about \d+ s without evaluations \(speed of earlier runs here\)", printed)
    assert "(1 run here)" in printed


def test_log_has_one_line_about_the_stop(resumed: tuple[RunFolder, list[Measured]]) -> None:
    run, _ = resumed
    log = run.log_file.read_text()
    lines = [line.split(maxsplit=2)[2] for line in log.splitlines() if "stopped by" in line]
    assert lines == [f"INFO    run: stopped by SIGTERM (checkpoint of step 3: {run.checkpoint(3)})"]
    assert "Traceback" not in log
