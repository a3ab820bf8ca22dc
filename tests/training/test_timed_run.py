"""`train.minutes`: a trial sets the number of steps, leaves no trace in the run, and a resumed run keeps the number."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_train.config.writer import to_yaml
from qlora_train.runs import RunFolder, read_json
from qlora_train.training import held_out_samples
from qlora_train.training.timed_run import StepTimes, affordable_steps
from qlora_train.utils.errors import CheckpointError, ConfigError, TrainingError
from tests.support.pico import build_pico
from tests.support.ranked_runs import RankedRuns
from tests.support.runs import adapter_bytes, losses, make_config, metrics, stopped_copy, train_run

MINUTES = (
    "train.max_steps=null", "train.minutes=0.05", "train.eval_steps=4", "train.save_steps=4", "lora.lora_dropout=0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def timed(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_run(tmp_path_factory.mktemp("timed"), pico_llama, *MINUTES)


def num_steps(run: RunFolder) -> int:
    return int(json.loads(run.num_steps_file.read_text())["num_steps"])


def test_run_has_the_steps_of_its_trial(timed: RunFolder) -> None:
    assert num_steps(timed) == metrics(timed)[-1]["step"] == timed.read_results()["training"]["steps"]
    assert num_steps(timed) > 6


def test_trial_leaves_no_trace(timed: RunFolder, pico_llama: Path) -> None:
    """The run equals one with the same number of steps in its config, dropout masks included."""
    settings = (*MINUTES[2:], f"train.max_steps={num_steps(timed)}")
    untimed = train_run(timed.path.parent, pico_llama, *settings, name="untimed")
    assert losses(timed) == losses(untimed)
    assert adapter_bytes(timed) == adapter_bytes(untimed)


def test_resumed_run_keeps_its_number_of_steps(timed: RunFolder, pico_llama: Path) -> None:
    stopped = stopped_copy(timed, timed.path.parent / "stopped")
    resumed = train_run(timed.path.parent, pico_llama, *MINUTES, name="stopped")
    assert num_steps(stopped) == num_steps(timed)
    assert adapter_bytes(resumed) == adapter_bytes(timed)


def test_lost_number_of_steps_is_an_error_that_names_it(timed: RunFolder, pico_llama: Path) -> None:
    stopped = stopped_copy(timed, timed.path.parent / "lost")
    stopped.num_steps_file.unlink()
    with pytest.raises(CheckpointError, match=f'"num_steps": {num_steps(timed)}'):
        train_run(timed.path.parent, pico_llama, *MINUTES, name="lost")


def test_a_run_that_never_saved_is_timed_again(timed: RunFolder, pico_llama: Path) -> None:
    """Its error may have been mended in the config: with other settings, steps take another time."""
    config = make_config(timed.path.parent, pico_llama, *MINUTES, name="again")
    run = RunFolder(timed.path.parent / "again")
    run.path.mkdir()
    run.config_file.write_text(to_yaml(config))
    run.num_steps_file.write_text(json.dumps({"minutes": 0.05, "num_steps": 1}))
    train_run(timed.path.parent, pico_llama, *MINUTES, name="again")
    assert num_steps(run) == metrics(run)[-1]["step"] > 1


def test_time_of_samples_counts(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_model: Any, _tokenizer: Any, prompts: Sequence[Any], **_keywords: Any) -> list[str]:
        time.sleep(0.5)
        return ["an answer"] * len(prompts)

    monkeypatch.setattr(held_out_samples, "generate_answers", slow)
    run = train_run(tmp_path, pico_llama, *MINUTES, "train.minutes=0.2", "data.eval=0.25", "run.samples=2")
    times = read_json(run.num_steps_file)
    assert times["eval_seconds"] >= 0.5
    assert times["trial_seconds"] >= 1.0, "the trial's own, and those before the first step"
    assert run.samples_file.read_text().count('"step": 0,') == 2, "those of the trial are not recorded"


def test_stream_ends_in_time_too(pico_llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    run = train_run(tmp_path, pico_llama, *MINUTES, "data.streaming=true", f"data.eval={rows}")
    assert metrics(run)[-1]["step"] == num_steps(run)


def test_two_processes_have_the_same_number_of_steps(tmp_path: Path) -> None:
    runs = RankedRuns(tmp_path, build_pico(tmp_path / "base", num_hidden_layers=1))
    run = runs.new()
    runs.finished_by_ranks(run, 2, *MINUTES[:-1], "data.eval=0.25")
    assert metrics(run)[-1]["step"] == num_steps(run)


def test_time_too_short_for_a_step_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"train\.minutes: 1e-05 is too short: .* raise it"):
        train_run(tmp_path, pico_llama, "train.max_steps=null", "train.minutes=0.00001")


def test_steps_and_time_exclude_each_other(pico_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"6 and train\.minutes: 5 both set the number of steps; drop one of them"):
        make_config(tmp_path, pico_llama, "train.minutes=5")


@pytest.mark.parametrize(("eval_seconds", "period"), [(0.0, None), (3.0, 10.0), (3.0, 7.5)])
def test_steps_and_evaluations_fill_the_time(eval_seconds: float, period: float | None) -> None:
    times = StepTimes(step_seconds=0.5, eval_seconds=eval_seconds, trial_seconds=10)
    steps = affordable_steps(times, 1000, period)
    seconds = [10 + 0.5 * n + (eval_seconds * (n / period + 1) if period else 0) for n in (steps, steps + 2)]
    assert seconds[0] <= 990 * 0.98 + 10 < seconds[1]
