"""A run on a local Ray cluster: a killed process is started again and the run resumes; errors of the user end it."""

import sys
from pathlib import Path

import pytest

from qlora_train.cli.main import main
from tests.support.launched import SETTINGS, adapter_distance, output, start, write_run
from tests.support.runs import train_run

CLI = (sys.executable, "-m", "qlora_train.cli.main")


def test_killed_processes_are_started_again_and_the_run_resumes(pico_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    run = write_run(tmp_path, pico_llama)
    ray = start(*CLI, "ray", str(run.config), "--workers=2", "--max-failures=2", RAY_DEDUP_LOGS="0")
    run.wait_for_step(4, ray)
    run.processes()[1].kill()
    run.wait_for_step(16, ray)
    worker = run.processes()[0].parent()
    assert worker is not None
    assert worker.name().startswith("ray::")
    worker.kill()
    log = output(ray)
    assert ray.returncode == 0, log
    assert log.count("training: resumes from") == 2
    unbroken = train_run(tmp_path, pico_llama, *SETTINGS, name="unbroken")
    assert adapter_distance(run.folder, unbroken) <= 1e-4


def test_error_of_the_user_is_not_tried_again(pico_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    run = write_run(tmp_path, pico_llama, f"data.train={tmp_path}/none.jsonl")
    ray = start(*CLI, "ray", str(run.config), "--workers=2", "--max-failures=2", RAY_DEDUP_LOGS="0")
    log = output(ray)
    assert ray.returncode == 2, log
    assert "none.jsonl does not exist" in log
    assert log.count("Attempting to start training worker group") == 1


@pytest.mark.parametrize("workers", ["0", "two", "4:2", "1:2:3", "-1"])
def test_wrong_number_of_workers_is_one_line(workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ray", "configs/llama7b.yaml", f"--workers={workers}"]) == 2
    assert f"--workers: '{workers}' is not a number of processes" in capsys.readouterr().err


def test_command_without_ray_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["ray", "configs/llama7b.yaml", "--workers=2"]) == 2
    assert capsys.readouterr().err == "ray: needs the package ray; run: pip install 'qlora-train[ray]'\n"
