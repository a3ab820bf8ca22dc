"""What experiment trackers receive: the settings of the run and its metrics, not the arguments of TRL."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    assert logged == [line["loss"] for line in metrics(run) if "loss" in line]


def test_tensorboard_holds_the_settings_and_losses_of_the_run(pico_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_run(tmp_path, pico_llama, *SETTINGS, "run.report_to=[tensorboard]")
    [file] = run.path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    [text] = events.Tensors("args/text_summary")
    settings = json.loads(text.tensor_proto.string_val[0])
    assert (settings["train.gradient_accumulation_steps"], settings["data.packing"]) == (3, True)
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in metrics(run) if "loss" in line]
    )
