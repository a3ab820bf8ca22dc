"""A checkpoint of valid manifest and malformed content is a one-line error, and trains nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import CheckpointError
from tests.support.runs import train_run

SETTINGS = ("train.max_steps=3", "train.save_steps=1")
SHAPES: list[Any] = [None, [], {}, 5, "text", {"a": 1}, [[[]]], {"__tensor__": "0"}]
STEP = 2


@pytest.fixture(scope="module")
def straight(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_run(tmp_path_factory.mktemp("straight"), pico_llama, *SETTINGS)


@pytest.fixture
def stopped(straight: RunFolder, tmp_path: Path) -> RunFolder:
    """The run after its second step."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(straight.path, run.path)
    shutil.copy(straight.path.parent / "rows.jsonl", tmp_path)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoint(STEP + 1))
    return run


def resume(run: RunFolder, base: Path) -> None:
    """Write a matching manifest for the checkpoint, and resume from it."""
    atomic_io.write_manifest(run.checkpoint(STEP), atomic_io.read_metadata(run.checkpoint(STEP)))
    assert run.checkpoint_problem(STEP) is None
    train_run(run.path.parent, base, *SETTINGS, "run.allow_changed=[data.train]")


@pytest.mark.parametrize("value", SHAPES, ids=json.dumps)
@pytest.mark.parametrize("name", ["adapter", "optimizer", "random", "loop", "trainer_state"])
def test_json_of_another_shape_is_one_line(name: str, value: Any, stopped: RunFolder, pico_llama: Path) -> None:
    (stopped.checkpoint(STEP) / f"{name}.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError) as caught:
        resume(stopped, pico_llama)
    assert "\n" not in str(caught.value)
    assert not stopped.adapter.exists()


@pytest.mark.parametrize("name", ["adapter", "optimizer", "random", "loop"])
def test_checkpoint_without_its_tensors_is_one_line(name: str, stopped: RunFolder, pico_llama: Path) -> None:
    file = stopped.checkpoint(STEP) / f"{name}.safetensors"
    save_file({f"other-{key}": torch.ones(1) for key in load_file(file)}, file)
    with pytest.raises(CheckpointError):
        resume(stopped, pico_llama)


def test_history_of_another_step_is_one_line(stopped: RunFolder, pico_llama: Path) -> None:
    shutil.copy(stopped.checkpoint(STEP - 1) / "trainer_state.json", stopped.checkpoint(STEP))
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is that of step 1"):
        resume(stopped, pico_llama)
