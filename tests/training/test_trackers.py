"""What experiment trackers receive: the settings of the run and its metrics, not the arguments of TRL."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from qlora_train.runs import RunFolder
from qlora_train.training import tracking
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.utils import signals
from qlora_train.utils.errors import TrainingError
from qlora_train.utils.run_events import Event, StepEnded, listening
from tests.support.runs import metrics, train_run

SETTINGS = (
    "train.max_steps=2", "train.gradient_accumulation_steps=3", "data.packing=true", "train.fused_kernels=false",
)  # fmt: skip
WANDB = '''
"""The part of W&B's interface that the callback of Transformers uses; writes what it receives to a file."""
import json
from pathlib import Path

run = None


class Run:
    def __init__(self):
        self.summary = {}

    def _label(self, **_keywords):
        pass


class Config(dict):
    def update(self, values, allow_val_change):
        write("config", {key: value for key, value in values.items() if key != "peft_config"})


config = Config()


def init(**_arguments):
    global run
    run = Run()


def log(values):
    write("metrics", values)


def write(kind, values):
    with Path(__file__).with_name("received.jsonl").open("a") as lines:
        lines.write(json.dumps([kind, values]) + "\\n")
'''


@pytest.fixture
def received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an installed package `wandb` writes what it receives."""
    package = tmp_path / "packages" / "wandb"
    (package / "sdk" / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text(WANDB)
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception):\n    pass\n")
    monkeypatch.syspath_prepend(str(package.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    return package / "received.jsonl"


def flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def test_tracker_receives_the_settings_and_metrics_of_the_run(received: Path, pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico_llama, *SETTINGS, "run.report_to=[wandb]")
    entries = [json.loads(line) for line in received.read_text().splitlines()]
    [settings] = [values for kind, values in entries if kind == "config"]
    assert (settings["train.gradient_accumulation_steps"], settings["data.packing"]) == (3, True)
    assert not {"gradient_accumulation_steps", "packing", "max_length"} & settings.keys(), "TRL's are not the run's"
    of_run = flat(yaml.safe_load(run.config_file.read_text()))
    assert {key for key, value in of_run.items() if settings[key] != value} == {"train.optim"}
    assert of_run["train.optim"] == "auto" != settings["train.optim"], "the optimizer that was chosen"
    logged = [values["train/loss"] for kind, values in entries if kind == "metrics" and "train/loss" in values]
    assert logged == logged_losses(run)


def test_tensorboard_holds_the_settings_and_losses_of_the_run(pico_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_run(tmp_path, pico_llama, *SETTINGS, "run.report_to=[tensorboard]")
    [file] = (run.path / "tensorboard").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    [text] = events.Tensors("args/text_summary")
    check_settings(json.loads(text.tensor_proto.string_val[0]))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged_losses(run))


def test_mlflow_holds_the_settings_and_losses_of_the_run(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    use_mlflow_in(tmp_path, monkeypatch)
    run = train_run(tmp_path, pico_llama, *SETTINGS, "run.report_to=[mlflow]", name="adder")
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("qlora-train").experiment_id])
    assert (found.info.run_name, found.info.status) == ("adder", "FINISHED")
    check_settings({name: yaml.safe_load(value) for name, value in found.data.params.items() if "." in name})
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [metric.value for metric in sorted(history, key=lambda metric: metric.step)] == logged_losses(run)


def test_a_stop_ends_the_runs_of_trackers_as_killed(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("tensorboard")
    closed = []
    close = TensorBoardCallback.on_train_end
    monkeypatch.setattr(TensorBoardCallback, "on_train_end", lambda *a, **k: closed.append(close(*a, **k)))
    use_mlflow_in(tmp_path, monkeypatch)
    monkeypatch.setattr(signals._process, "requested", None)  # restored after the test

    def stop_after_first_step(event: Event) -> None:
        if isinstance(event, StepEnded) and event.step == 1:
            signals.request("SIGTERM", 143)

    with listening(stop_after_first_step), pytest.raises(signals.Stop):
        train_run(tmp_path, pico_llama, *SETTINGS, "train.max_steps=3", "run.report_to=[mlflow,tensorboard]")
    assert mlflow_status() == "KILLED"
    assert mlflow.active_run() is None
    assert len(closed) == 1


def test_an_error_ends_the_runs_of_trackers_as_failed(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    use_mlflow_in(tmp_path, monkeypatch)

    def fails(*_arguments: Any, **_keywords: Any) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(QloraTrainer, "_get_grad_norm", fails)
    with pytest.raises(RuntimeError, match="the device is lost"):
        train_run(tmp_path, pico_llama, *SETTINGS, "run.report_to=[mlflow]")
    assert mlflow_status() == "FAILED"


def use_mlflow_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # its registry of models is a file there
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


def mlflow_status() -> str:
    """Return the status of the only run."""
    client = pytest.importorskip("mlflow").MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("qlora-train").experiment_id])
    status: str = found.info.status
    return status


def test_trackio_holds_the_settings_and_losses_of_the_run(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    run = train_run(tmp_path, pico_llama, *SETTINGS, "run.report_to=[trackio]", name="adder")
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    [found] = trackio.Api().runs("qlora-train")
    assert found.name == "adder"
    check_settings(found.config)
    logs = SQLiteStorage.get_logs("qlora-train", "adder")
    assert [entry["train/loss"] for entry in logs if "train/loss" in entry] == logged_losses(run)
    assert "\x1b" not in "".join(capfd.readouterr()), "no banner"


class Failing(TrainerCallback):
    """A tracker whose server goes away after the first metrics."""

    fails_at_start = False
    num_logs = 0

    def on_train_begin(self, *_arguments: Any, **_keywords: Any) -> None:
        if self.fails_at_start:
            raise ConnectionError("connection refused\nby host")

    def on_log(self, *_arguments: Any, **_keywords: Any) -> None:
        type(self).num_logs += 1
        raise ConnectionError("server is gone")


@pytest.fixture
def failing(received: Path, monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    monkeypatch.setitem(tracking.INTEGRATION_TO_CALLBACK, "wandb", Failing)
    monkeypatch.setattr(Failing, "num_logs", 0)
    return Failing


def test_tracker_that_fails_is_off_and_the_run_goes_on(
    failing: type[Failing], pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train_run(tmp_path, pico_llama, *SETTINGS, "run.report_to=[wandb]")
    assert run.is_finished()
    assert len(logged_losses(run)) == 2
    assert failing.num_logs == 1
    [warning] = [record.getMessage() for record in caplog.records if "report_to" in record.getMessage()]
    assert warning.startswith(
        "run.report_to: wandb failed and is off until the run resumes (ConnectionError: server is gone)"
    )


def test_tracker_that_cannot_start_is_one_line(
    failing: type[Failing], pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failing, "fails_at_start", True)
    with pytest.raises(
        TrainingError, match="wandb cannot start: ConnectionError: connection refused; mend that"
    ) as caught:
        train_run(tmp_path, pico_llama, *SETTINGS, "run.report_to=[wandb]")
    assert "\n" not in str(caught.value)


def check_settings(settings: dict[str, Any]) -> None:
    assert (settings["train.gradient_accumulation_steps"], settings["data.packing"]) == (3, True)


def logged_losses(run: RunFolder) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]
