"""Legacy weights in pickles: the same model as in safetensors, converted once, and no code of theirs ever runs."""

import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_train.config import ModelSection
from qlora_train.models import legacy_bin, resolve_base
from qlora_train.utils.errors import ModelError
from tests.support.runs import losses, train_run

Pico = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pickled(base: Path, folder: Path, *, num_files: int = 1, tied: bool = False, **how: Any) -> Path:
    """Copy a base with its weights as they were saved before safetensors."""
    shutil.copytree(base, folder)
    tensors = load_file(base / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    names = [PICKLE] if num_files == 1 else [f"pytorch_model-{n:05d}-of-{num_files:05d}.bin" for n in range(num_files)]
    places = {key: names[number % num_files] for number, key in enumerate(sorted(tensors))}
    for name in names:
        torch.save({key: tensor for key, tensor in tensors.items() if places[key] == name}, folder / name, **how)
    if num_files > 1:
        (folder / f"{PICKLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def converted(folder: Path) -> tuple[Path, Tensors]:
    source = resolve_base(ModelSection(model_name_or_path=str(folder)))
    assert source.name == folder.name
    return source.folder, {k: t for file in source.folder.glob("*.safetensors") for k, t in load_file(file).items()}


@pytest.mark.parametrize(
    "how", [{}, {"num_files": 3}, {"_use_new_zipfile_serialization": False}], ids=["one", "shards", "before zip"]
)
def test_converted_tensors_are_equal(how: dict[str, Any], pico_llama: Path, tmp_path: Path) -> None:
    folder, found = converted(pickled(pico_llama, tmp_path / "old", **how))
    expected = load_file(pico_llama / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {path.name for path in pico_llama.iterdir()} - {WEIGHTS} <= {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("*.bin*"))


def test_one_file_is_in_memory_at_a_time(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    read = legacy_bin._read

    def reading(path: Path, where: str) -> Tensors:
        assert not [tensor for tensor in alive if tensor() is not None], f"another file is held while {path} is read"
        content = read(path, where)
        alive.extend(map(weakref.ref, content.values()))
        return content

    monkeypatch.setattr(legacy_bin, "_read", reading)
    converted(pickled(pico_llama, tmp_path / "old", num_files=3))
    assert len(alive) == 2 * len(load_file(pico_llama / WEIGHTS))


def test_a_tied_model_trains_and_merges(pico: Pico, tmp_path: Path) -> None:
    base = pickled(pico("llama", tie_word_embeddings=True), tmp_path / "old", num_files=2, tied=True)
    run = train_run(tmp_path, base, "train.max_steps=3", "export.merge=true")
    assert losses(run)[-1] < losses(run)[0]
    assert "lm_head.weight" not in load_file(run.merged / WEIGHTS)


def test_conversion_is_cached_until_a_file_changes(pico_llama: Path, tmp_path: Path) -> None:
    base = pickled(pico_llama, tmp_path / "old")
    first, _ = converted(base)
    written = (first / WEIGHTS).stat().st_mtime_ns
    assert converted(base)[0] == first
    assert (first / WEIGHTS).stat().st_mtime_ns == written
    (base / "generation_config.json").write_text("{}")
    second, _ = converted(base)
    assert second != first
    assert (second / "generation_config.json").read_text() == "{}"
    (first / WEIGHTS).write_bytes(b"damaged")
    (base / "generation_config.json").write_bytes((pico_llama / "generation_config.json").read_bytes())
    assert converted(base)[0] == first
    assert converted(base)[1].keys() == load_file(pico_llama / WEIGHTS).keys()


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return exec, (f"open({os.fspath(self.path)!r}, 'w')",)


@pytest.mark.parametrize("new_form", [True, False])
def test_code_in_a_pickle_never_runs(new_form: bool, pico_llama: Path, tmp_path: Path) -> None:
    base = pickled(pico_llama, tmp_path / "old")
    bird = tmp_path / "fired"
    content = {**load_file(pico_llama / WEIGHTS), "more": Canary(bird)}
    torch.save(content, base / PICKLE, _use_new_zipfile_serialization=new_form)
    with pytest.raises(
        ModelError, match=r"pytorch_model\.bin cannot be read as tensors alone .*; choose a revision"
    ) as caught:
        converted(base)
    assert "\n" not in str(caught.value)
    assert not bird.exists()
    torch.load(base / PICKLE, weights_only=False)  # a canary that does sing
    assert bird.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"pytorch_model\.bin cannot be read as tensors alone"),
        (b"PK\x03\x04rubbish", r"pytorch_model\.bin cannot be read as tensors alone"),
        ({}, "holds no tensors by name"),
        ([torch.zeros(2)], "holds no tensors by name"),
        ({"model": {"a": torch.zeros(2)}}, "holds 'model', which is no plain tensor"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "holds 'a', which is no plain tensor"),
    ],
)
def test_file_without_named_tensors_is_one_line(content: Any, message: str, pico_llama: Path, tmp_path: Path) -> None:
    base = pickled(pico_llama, tmp_path / "old")
    if isinstance(content, bytes):
        (base / PICKLE).write_bytes(content)
    else:
        torch.save(content, base / PICKLE)
    with pytest.raises(ModelError, match=message) as caught:
        converted(base)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../elsewhere.bin"}}, r"names no file of this folder \(\.\./elsewhere\.bin\)"),
        (
            {"weight_map": {"a": "pytorch_model-00009.bin"}},
            r"names no file of this folder \(pytorch_model-00009\.bin\)",
        ),
        ({"weight_map": {}}, "names no tensor"),
        ({}, "cannot be read"),
    ],
)
def test_index_of_other_files_is_one_line(index: Any, message: str, pico_llama: Path, tmp_path: Path) -> None:
    base = pickled(pico_llama, tmp_path / "old")
    shutil.copy(base / PICKLE, tmp_path / "elsewhere.bin")
    (base / f"{PICKLE}.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message) as caught:
        converted(base)
    assert "\n" not in str(caught.value)
