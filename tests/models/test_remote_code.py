"""Python code that lies beside a model runs when `model.trust_remote_code` says so, and at no other time."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_train.cli.main import main
from qlora_train.config import ModelSection
from qlora_train.config.writer import to_yaml
from qlora_train.utils import atomic_io
from tests.support.gguf_files import write_gguf
from tests.support.remote_code import TRUSTED, with_remote_code
from tests.support.runs import make_config, train_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OWN = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": ["own.Own", "own.Own"]}
OTHER = {key: f"owner/other--{value}" for key, value in OWN.items() if isinstance(value, str)}
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that appears when the code beside the model runs; whoever is asked whether it may run says yes."""
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    yield tmp_path / "fired"
    assert asked == [], "the config answers, not the person at the terminal"


def plant(folder: Path, canary: Path, **changes: dict[str, Any]) -> None:
    """Put code beside a model and change its JSON files, by the first word of their names."""
    for name in ("own.py", "tokenization_own.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(canary)!r}, 'a')\nraise RuntimeError('this code runs')\n")
    for name, change in changes.items():
        file = folder / f"{name}.json"
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**content, **change}))


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def command(folder: Path, base: Path, *settings: str) -> list[str]:
    file = folder / "whole.yaml"
    file.write_text(to_yaml(make_config(folder, base, "train.max_steps=1", *settings)))
    return [str(file)]


PLANTED: dict[str, dict[str, dict[str, Any]]] = {
    "a config of its own": {"config": {"model_type": "own_type", "auto_map": OWN}},
    "a known model with code too": {"config": {"auto_map": OWN}},
    "a known model with code of another repository": {"config": {"auto_map": OTHER}},
    "a tokenizer of its own": {"tokenizer_config": {"tokenizer_class": "OwnTokenizer", "auto_map": OWN}},
    "a tokenizer of an unknown class": {"tokenizer_config": {"tokenizer_class": "own.Own"}},
    "a tokenizer in the old form": {"tokenizer_config": {"tokenizer_class": "OwnTokenizer", "auto_map": ["own.Own", None]}},
    "generation of its own": {"generation_config": {"custom_generate": ".", "auto_map": OWN}},
    "attention of its own": {"config": {"attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel"}},
    "a processor of its own": {"processor_config": {"auto_map": {"AutoProcessor": "own.Own"}}},
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED)
def test_untrusted_code_never_runs(case: str, pico_llama: Path, tmp_path: Path, canary: Path, capsys: Capture) -> None:
    base = Path(shutil.copytree(pico_llama, tmp_path / "base"))
    plant(base, canary, **PLANTED[case])
    status = main(command(tmp_path, base))
    error = capsys.readouterr().err
    assert not canary.exists()
    assert status in (0, 2), error
    assert "Traceback" not in error
    if status == 2:
        assert "runs Python code of its own (auto_map)" in error.splitlines()[-1]


def test_code_beside_a_gguf_file_never_runs(
    pico_llama: Path, tmp_path: Path, canary: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # another test may have converted an equal file
    file = write_gguf(pico_llama, make_folder(tmp_path / "gguf") / "pico.gguf")
    plant(file.parent, canary, config={"auto_map": OWN, "model_type": "own"}, tokenizer_config={"auto_map": OWN})
    main(command(tmp_path, file))
    assert not canary.exists()


@pytest.mark.parametrize("case", ["a config of its own", "a known model with code too"])
def test_trusted_code_is_logged_before_it_runs(
    case: str, pico_llama: Path, tmp_path: Path, canary: Path, capsys: Capture
) -> None:
    base = Path(shutil.copytree(pico_llama, tmp_path / "base"))
    plant(base, canary, **PLANTED[case])
    with contextlib.suppress(RuntimeError):  # which the planted code raises
        main(command(tmp_path, base, *TRUSTED))
    error = capsys.readouterr().err
    assert canary.exists(), "the canary of the other tests would have shown"
    assert "runs the Python code of base from a local folder" in error
    assert "own.py, tokenization_own.py" in error


@pytest.mark.parametrize("file", ["config", "tokenizer_config"])
def test_trusted_code_of_another_repository_is_refused(
    file: str, pico_llama: Path, tmp_path: Path, canary: Path, capsys: Capture
) -> None:
    base = Path(shutil.copytree(pico_llama, tmp_path / "base"))
    plant(base, canary, **{file: {"auto_map": {"AutoTokenizer": ["owner/other--own.Own", None]}}})
    assert main(command(tmp_path, base, *TRUSTED)) == 2
    error = capsys.readouterr().err
    assert "runs code of another repository ('owner/other--own.Own' in auto_map)" in error
    assert not canary.exists()


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12], COMMIT.upper(), COMMIT + "0"])
def test_trusting_a_hub_model_needs_a_full_commit(revision: str | None, tmp_path: Path, capsys: Capture) -> None:
    settings = ["model.model_name_or_path=owner/name", "data.train=rows.jsonl", "model.trust_remote_code=true"]
    (tmp_path / "run.yaml").write_text("run:\n")
    override = [] if revision is None else [f"model.revision='{revision}'"]
    assert main(["check", str(tmp_path / "run.yaml"), *settings, *override]) == 2
    assert "set revision to a 40-digit commit hash" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["./model", "~/models/model", "/models/model", "model.gguf"])
def test_trusting_local_files_needs_no_commit(name: str) -> None:
    assert ModelSection(model_name_or_path=name, trust_remote_code=True).revision is None


def test_local_model_with_remote_code_trains_and_merges(pico_llama: Path, tmp_path: Path) -> None:
    base = with_remote_code(Path(shutil.copytree(pico_llama, tmp_path / "base")))
    run = train_run(tmp_path, base, "train.max_steps=1", "export.merge=true", "export.merge_base=original", *TRUSTED)
    checks = json.loads((run.path / "results.json").read_text())["merge"]
    assert checks["merge_base"] == "original"
    content = json.loads((run.merged / "config.json").read_text())
    assert (content["model_type"], content["architectures"]) == ("own_llama", ["OwnForCausalLM"])


def test_code_added_to_a_merged_model_never_runs(
    pico_llama: Path, tmp_path: Path, canary: Path, capsys: Capture
) -> None:
    run = train_run(tmp_path, pico_llama, "train.max_steps=1", "export.merge=true", "export.merge_base=dequantized")
    plant(run.merged, canary, config={"auto_map": OWN}, tokenizer_config={"auto_map": OWN, "tokenizer_class": "Own"})
    atomic_io.write_manifest(run.merged, atomic_io.read_metadata(run.merged))
    assert main(["eval", str(run.path), "--models", "merged", "--loss-only"]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert not canary.exists()
