"""How many processes a config starts, by its settings, the visible GPUs and the launcher."""

from pathlib import Path

import pytest

from qlora_train.config import RunConfig
from qlora_train.parallel.num_processes import check_launched_processes, choose_num_processes
from qlora_train.utils import visible_gpus as gpus
from qlora_train.utils.device import prepare_cuda
from qlora_train.utils.errors import ConfigError, ModelError
from qlora_train.utils.launcher import Worker
from qlora_train.utils.visible_gpus import visible_gpus


def config_of(rows_per_step: int = 16, **parallel: str | int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"model_name_or_path": "a/b"},
            "data": {"train": "a.jsonl"},
            "train": {"gradient_accumulation_steps": rows_per_step},
            "parallel": parallel,
        }
    )


@pytest.mark.parametrize(
    ("visible", "config", "expected"),
    [
        ("0,1,2", config_of(), 3),
        ("0,1,2", config_of(2), 2),
        ("GPU-1f", config_of(), 1),
        ("", config_of(), 1),
        ("-1", config_of(), 1),
        ("0,1,2", config_of(strategy="none"), 1),
        ("0,1,2", config_of(processes=2), 2),
        ("", config_of(processes=4), 4),
    ],
)
def test_one_process_per_visible_gpu_or_as_the_config_says(
    visible: str, config: RunConfig, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose_num_processes(config) == expected


def test_gpus_are_counted_by_their_device_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert visible_gpus() == ["0", "1"]


@pytest.mark.parametrize(("second", "expected"), [("NVIDIA GeForce RTX 4090", 2), ("NVIDIA T400 4GB", 1)])
def test_gpus_of_several_kinds_are_left_to_the_user(
    second: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setattr(gpus, "DRIVER_FILES", tmp_path / "gpus")
    for number, model in enumerate(("NVIDIA GeForce RTX 4090", second)):
        (tmp_path / f"nvidia{number}").touch()
        information = tmp_path / "gpus" / f"0000:0{number}:00.0" / "information"
        information.parent.mkdir(parents=True)
        information.write_text(f"Model: \t\t {model}\nIRQ:   \t\t 200\n", encoding="utf-8")
    assert choose_num_processes(config_of()) == expected


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=r"parallel.processes: 4, but 2 GPUs are visible"):
        choose_num_processes(config_of(processes=4))
    with pytest.raises(ModelError, match=r"GPU: process 2 of this machine has none \(CUDA_VISIBLE_DEVICES=0,1\)"):
        prepare_cuda(local_rank=2)


@pytest.mark.parametrize(("visible", "local_rank", "own"), [("4,5", 1, "5"), ("GPU-1f", 3, "GPU-1f"), (None, 2, "2")])
def test_each_process_sees_one_gpu(
    visible: str | None, local_rank: int, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher may show each process its own GPU only."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    prepare_cuda(local_rank)
    assert visible_gpus() == [own]


def test_the_only_process_of_a_launcher_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert choose_num_processes(config_of()) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of(strategy="none"), "parallel.strategy: none, but a launcher started 4 processes"),
        (config_of(processes=2), "parallel.processes: 2, but a launcher started 4"),
        (config_of(3), "train.gradient_accumulation_steps: an optimizer step has 3 rows, fewer than the 4 processes"),
    ],
)
def test_launched_processes_must_fit_the_config(config: RunConfig, message: str) -> None:
    worker = Worker(0, 4, 0, 4, "tcp://localhost:1")
    check_launched_processes(config_of(4), worker)
    check_launched_processes(config_of(processes=4), worker)
    with pytest.raises(ConfigError, match=message) as caught:
        check_launched_processes(config, worker)
    assert len(caught.value.problems) == 1
