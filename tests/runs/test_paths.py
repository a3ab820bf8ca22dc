"""Impossible paths are one-line errors, and nothing outside a run folder is written or deleted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_train.cli.main import main
from qlora_train.export.merging.merge_finished_run import merge
from qlora_train.inference.eval_report import EvalSettings, evaluate
from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import CheckpointError
from tests.support.runs import make_config, train_run

Capture = pytest.CaptureFixture[str]
SMALLEST: dict[str, Any] = {"model": {"model_name_or_path": "some/model"}, "data": {"train": "rows.jsonl"}}
PATH_FIELDS = (
    ("model", "model_name_or_path"), ("model", "chat_template"), ("lora", "adapter_path"), ("data", "train"),
    ("data", "eval"), ("data", "cache_dir"), ("run", "output_dir"),
)  # fmt: skip
IMPOSSIBLE = {"NUL": "a\0b", "300 characters": "x" * 300, "300 bytes": "runs/" + "ü" * 150 + "/y"}


def refusal(folder: Path, section: str, key: str, value: Any, capsys: Capture) -> str:
    """Return the one-line error for a config with this value."""
    file = folder / "run.yaml"
    content = {**SMALLEST, section: {**SMALLEST.get(section, {}), key: value}}
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    assert main(["train", str(file)]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert output.out == ""
    assert line.startswith(f"{file}:")
    assert f": {section}.{key}" in line
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]
    return line


@pytest.mark.parametrize("text", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
@pytest.mark.parametrize(("section", "key"), PATH_FIELDS, ids=".".join)
def test_path_that_no_file_system_holds_is_one_line(
    section: str, key: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(tmp_path, section, key, text, capsys)
    assert "allowed: " in line
    assert len(line) < 400
    assert "\0" not in line


def test_longest_name_that_a_file_system_takes_is_taken(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "run.yaml"
    (tmp_path / ("x" * 255)).mkdir()  # this one does
    (tmp_path / "rows.jsonl").touch()
    data = {"train": str(tmp_path / "rows.jsonl")}
    file.write_text(json.dumps({**SMALLEST, "data": data, "run": {"output_dir": "x" * 255}}), encoding="utf-8")
    assert main(["check", str(file)]) == 0


@pytest.mark.parametrize("scheme", ["http", "https", "file", "ftp", "s3", "gs", "hf"])
@pytest.mark.parametrize("key", ["train", "eval"])
def test_data_from_a_url_is_refused_with_what_is_allowed(
    scheme: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(tmp_path, "data", key, f"{scheme}://place.example/rows.jsonl", capsys)
    assert f"a URL ({scheme}://...) is not read; allowed: a local file, folder or pattern, or the Hub id" in line


# --- links out of a run folder ---------------------------------------------------------------------------------

FILES = (".lock", "config.yaml", "run.json", "data.json", "metrics.jsonl", "results.json", "answers.jsonl")
FOLDERS = (
    "checkpoints", "adapter", "merged", "checkpoints/step-00000001", "checkpoints/step-00000009", ".adapter.staging",
    ".adapter.old", ".merged.deleted", "checkpoints/.step-00000001.deleted", "checkpoints/.step-00000009.staging",
)  # fmt: skip
SETTINGS = ("train.max_steps=3", "train.save_steps=1", "train.save_total_limit=1")


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and mtime of every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def whole_run(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder around a finished run with several checkpoints, to be copied."""
    folder = tmp_path_factory.mktemp("whole")
    train_run(folder, pico_llama, *SETTINGS, "train.save_total_limit=3")
    return folder


@pytest.fixture
def link(whole_run: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`link(name) -> outside`: move a file or folder of the run outside, add a canary, and link to it.

    An empty name is the run folder itself.
    """
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)

    def put(name: str) -> Path:
        place, outside = tmp_path / "run" / name, tmp_path / "outside" / "kept"
        outside.parent.mkdir()
        if place.exists():
            place.rename(outside)
        elif name in FILES:
            outside.write_text("canary\n", encoding="utf-8")
        else:
            outside.mkdir()
        if outside.is_dir():
            (outside / "canary.txt").write_text("canary\n", encoding="utf-8")
        place.symlink_to(outside)
        return outside.parent

    return put


@pytest.mark.parametrize("name", ["", *FILES, *FOLDERS])
def test_link_in_a_run_folder_is_refused_before_anything_changes(
    name: str, link: Callable[[str], Path], pico_llama: Path, tmp_path: Path
) -> None:
    outside = link(name)
    before = snapshot(outside), snapshot(tmp_path / "run")
    wanted = "is a link to .*outside/kept; a run"
    with pytest.raises(CheckpointError, match=wanted):
        train_run(tmp_path, pico_llama, *SETTINGS)
    run = RunFolder(tmp_path / "run")
    for command in (
        lambda: merge(run.path),
        lambda: evaluate(run.path, EvalSettings(generate=False)),
    ):
        with pytest.raises(CheckpointError):
            command()
    assert (snapshot(outside), snapshot(tmp_path / "run")) == before


def test_run_folder_below_a_linked_folder_is_used(pico_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "large disk")
    config = make_config(tmp_path, pico_llama, "train.max_steps=1", f"run.output_dir={tmp_path / 'runs' / 'a'}")
    assert config.run.output_dir
    train_run(tmp_path, pico_llama, "train.max_steps=1", f"run.output_dir={tmp_path / 'runs' / 'a'}")
    assert (tmp_path / "large disk" / "a" / "adapter").is_dir()


@pytest.mark.parametrize("name", FOLDERS)
def test_deletions_never_follow_links(name: str, link: Callable[[str], Path], tmp_path: Path) -> None:
    """Deletions are safe by themselves, without the check before them."""
    outside = link(name)
    before = snapshot(outside)
    run = RunFolder(tmp_path / "run")
    run.remove_stale_files()
    run.rotate(keep=1, best=None)
    run.delete_results()
    run.delete_checkpoints_after(run.checkpoint(0))
    run.remove_stale_files()
    for path in (run.adapter, run.merged, run.checkpoints):
        atomic_io.remove_folder(path)
    run.remove_stale_files()
    if name != "checkpoints":  # that one is the folder whose entries are deleted, which is why it is refused
        assert snapshot(outside) == before


def test_links_inside_a_checkpoint_and_an_adapter_are_deleted_as_links(pico_llama: Path, tmp_path: Path) -> None:
    train_run(tmp_path, pico_llama, *SETTINGS, "train.save_total_limit=3")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary.txt").write_text("canary\n", encoding="utf-8")
    before = snapshot(outside)
    run = RunFolder(tmp_path / "run")
    for folder in (run.adapter, run.merged, *(run.checkpoint(step) for step in run.checkpoint_steps())):
        folder.mkdir(exist_ok=True)
        (folder / "linked").symlink_to(outside)
    for leftover in (run.path / ".adapter.staging", run.checkpoints / ".step-00000001.deleted"):
        leftover.mkdir()
        (leftover / "linked").symlink_to(outside)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoint(3))
    train_run(tmp_path, pico_llama, *SETTINGS, "export.merge=true", "export.max_loss_increase=1")
    assert run.checkpoint_steps() == [3]
    assert run.has_merged()
    assert snapshot(outside) == before
