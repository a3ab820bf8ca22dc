"""A pickle in place of any file is never unpickled: its canary does not fire, and the error is one line.

The manifest is rewritten after each exchange, as an attacker would: this tests the readers, not the checksums.
"""

import contextlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_train.cli.main import main
from qlora_train.config import load_config
from qlora_train.config.writer import to_yaml
from qlora_train.export.merging.merge_finished_run import merge
from qlora_train.pipeline import run as run_config
from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import UserError
from tests.support.runs import make_config, train_run

SETTINGS = ("train.max_steps=2", "train.save_steps=1", "export.merge_base=dequantized")
PARTS = ("adapter", "optimizer", "random", "loop")
CHECKPOINT_FILES = (*(f"{part}.{suffix}" for part in PARTS for suffix in ("json", "safetensors")), "trainer_state.json")
"""Files of a checkpoint besides its manifest; a test checks that the list is complete."""
PICKLE_NAMES = (
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "adapter_model.bin",
)  # fmt: skip
"""Names of pickles that other programs write; they are ignored."""


@pytest.fixture(scope="module")
def trained(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished and merged run, with checkpoints and its own cache."""
    folder = tmp_path_factory.mktemp("trained")
    return train_run(folder, pico_llama, *SETTINGS, "export.merge=true", f"data.cache_dir={folder / 'cache'}")


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return exec, (f"open({os.fspath(self.path)!r}, 'w')",)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    bird = Canary(tmp_path / "fired")
    yield bird
    assert not bird.path.exists(), "a file of ours was unpickled"


@pytest.fixture
def own(trained: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the run that a test may change."""
    return RunFolder(Path(shutil.copytree(trained.path, tmp_path / "run")))


def exchange(file: Path, canary: Canary, folder: Path) -> None:
    """Replace a file by a pickle, and write a matching manifest."""
    assert file.is_file()
    file.write_bytes(pickle.dumps(canary))
    atomic_io.write_manifest(folder, atomic_io.read_metadata(folder))
    assert atomic_io.verify_manifest(folder) is None


def answered(action: Callable[[], Any]) -> None:
    """Run an action that must succeed or fail with a user error."""
    with contextlib.suppress(UserError):
        action()


def test_the_canary_fires_where_a_pickle_is_read(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "fired")))
    assert (tmp_path / "fired").exists()


def test_these_are_all_files_of_a_checkpoint_and_none_is_a_pickle(trained: RunFolder) -> None:
    assert {path.name for path in trained.checkpoint(2).iterdir()} == {*CHECKPOINT_FILES, "manifest.json"}
    files = [path for path in trained.path.rglob("*") if path.is_file()]
    assert {file.suffix for file in files} <= {
        ".safetensors",
        ".arrow",
        ".log",
        ".json",
        ".jsonl",
        ".yaml",
        ".jinja",
        ".md",
        ".html",
        "",
    }
    for file in files:
        if file.suffix not in (".safetensors", ".arrow"):
            file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_pickle_in_a_checkpoint_is_not_resumed_from(name: str, own: RunFolder, canary: Canary) -> None:
    shutil.rmtree(own.adapter)
    exchange(own.checkpoint(2) / name, canary, own.checkpoint(2))
    answered(lambda: run_config(_of(own)))
    answered(lambda: run_config(_of(own), resume=str(own.checkpoint(2))))


def _of(run: RunFolder) -> Any:
    config = load_config(run.config_file)
    return config.model_copy(update={"run": config.run.model_copy(update={"output_dir": str(run.path)})})


def test_pickles_beside_our_files_are_not_read(own: RunFolder, canary: Canary) -> None:
    def add_pickles(folder: Path) -> None:
        for name in PICKLE_NAMES:
            (folder / name).write_bytes(pickle.dumps(canary))
        atomic_io.write_manifest(folder, atomic_io.read_metadata(folder))

    shutil.rmtree(own.adapter)
    for folder in (own.checkpoint(1), own.checkpoint(2), own.merged):
        add_pickles(folder)
    run_config(_of(own))
    add_pickles(own.adapter)
    merge(own.path)
    assert main(["eval", str(own.path), "--loss-only"]) == 0


def files_of(kind: str, run: RunFolder) -> list[Path]:
    folder = run.adapter if kind == "adapter" else run.merged
    return sorted(path for path in folder.iterdir() if path.name != atomic_io.MANIFEST)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_pickle_in_a_result_is_not_read(
    kind: str, trained: RunFolder, canary: Canary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [file.name for file in files_of(kind, trained)]
    assert len(names) >= 5
    for name in names:
        own = RunFolder(Path(shutil.copytree(trained.path, tmp_path / f"{kind}-{name}")))
        folder = own.adapter if kind == "adapter" else own.merged
        exchange(folder / name, canary, folder)
        if kind == "adapter":
            answered(lambda own=own: merge(own.path))
        assert main(["eval", str(own.path), "--loss-only"]) in (0, 2), name
        assert "Traceback" not in capsys.readouterr().err, name


def test_pickle_in_the_folder_of_a_run_is_not_read(trained: RunFolder, canary: Canary, tmp_path: Path) -> None:
    names = [path.name for path in trained.path.iterdir() if path.is_file() and path.name != ".lock"]
    assert {"config.yaml", "run.json", "metrics.jsonl", "results.json"} <= set(names)
    for name in names:
        own = RunFolder(Path(shutil.copytree(trained.path, tmp_path / f"run-{name}")))
        config = _of(own)
        (own.path / name).write_bytes(pickle.dumps(canary))
        answered(lambda own=own: merge(own.path))
        shutil.rmtree(own.adapter)
        answered(lambda config=config: run_config(config))


def test_pickle_in_the_cache_of_tokenised_data_is_not_read(
    pico_llama: Path, tmp_path: Path, canary: Canary, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    config = tmp_path / "whole.yaml"
    config.write_text(to_yaml(make_config(tmp_path, pico_llama, f"data.cache_dir={cache}")))
    assert main(["data", str(config)]) == 0
    [store] = [path for path in cache.iterdir() if path.is_dir()]
    files = sorted(path.name for path in store.iterdir() if path.name != atomic_io.MANIFEST)
    assert len(files) >= 2
    before = tmp_path / "before"
    shutil.copytree(store, before)
    for name in files:
        shutil.rmtree(store)
        shutil.copytree(before, store)
        exchange(store / name, canary, store)
        capsys.readouterr()
        assert main(["data", str(config)]) in (0, 2), name
        assert "Traceback" not in capsys.readouterr().err, name


def test_pickle_in_place_of_a_model_file_is_not_read(
    pico_llama: Path, tmp_path: Path, canary: Canary, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in sorted(path.name for path in pico_llama.iterdir()):
        base = Path(shutil.copytree(pico_llama, tmp_path / f"base-{name}"))
        (base / name).write_bytes(pickle.dumps(canary))
        config = tmp_path / f"{name}.yaml"
        config.write_text(to_yaml(make_config(tmp_path, base, "train.max_steps=1", name=f"run-{name}")))
        assert main([str(config)]) in (0, 2), name
        assert "Traceback" not in capsys.readouterr().err, name
    base = Path(shutil.copytree(pico_llama, tmp_path / "pickled"))
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(canary))
    config.write_text(to_yaml(make_config(tmp_path, base, "train.max_steps=1", name="pickled-run")))
    assert main([str(config)]) == 2
