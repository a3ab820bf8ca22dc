"""The code on a card loads the trained model in a process that has only the files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from qlora_train import pipeline
from qlora_train.cli.main import main
from qlora_train.config.writer import to_yaml
from qlora_train.export import adapter_check, adapter_writer, fresh_process
from qlora_train.export.finished_run import open_finished_run
from qlora_train.utils.atomic_io import verify_manifest
from qlora_train.utils.errors import ExportError
from tests.support.runs import adapter_bytes, make_config, train_run

STEPS = ("train.max_steps=2",)
FLOAT32 = "quantization.bnb_4bit_compute_dtype=float32"


def without_quantization(*arguments: Any) -> str:
    """Be the lines of a card that loads the base in 16 bits."""
    code = adapter_check.adapter_code.original(*arguments)  # type: ignore[attr-defined]
    return re.sub(r"    quantization_config=.*?\n    \),\n", "", code, flags=re.DOTALL)


@pytest.fixture
def card_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    without_quantization.original = adapter_check.adapter_code  # type: ignore[attr-defined]
    monkeypatch.setattr(adapter_check, "adapter_code", without_quantization)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_run_records_that_its_adapter_is_what_was_trained(
    dtype: str, limit: float, pico_llama: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    run = train_run(tmp_path, pico_llama, *STEPS, f"quantization.bnb_4bit_compute_dtype={dtype}")
    result = run.read_results()["adapter_check"]
    assert result["passed"]
    assert result["token_differences"] == []
    assert result["num_texts"] > 150
    assert result["num_tokens"] > 100
    assert result["max_divergence"] == limit
    assert result["kl_divergence"] < limit / 10
    assert result["max_difference"] < (2e-3 if dtype == "float32" else 0.2)
    assert "adapter check: passed" in messages.text
    assert not list(run.path.glob(".adapter-check*"))
    train_run(tmp_path, pico_llama, *STEPS, f"quantization.bnb_4bit_compute_dtype={dtype}")
    assert messages.text.count("adapter check: passed") == 1, "once is enough"


def test_one_process_checks_its_adapter_however_little_memory_is_free(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "device_bytes", lambda _device: 1.0)
    assert train_run(tmp_path, pico_llama, *STEPS, FLOAT32).read_results()["adapter_check"]["passed"]


def test_card_that_loads_another_model_ends_in_one_line_and_keeps_the_adapter(
    pico_llama: Path, tmp_path: Path, card_in_16_bits: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "whole.yaml"
    config.write_text(to_yaml(make_config(tmp_path, pico_llama, *STEPS, FLOAT32, "export.merge=true")))
    for _ in range(2):  # started again, it finds the same
        assert main([str(config)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"adapter: the code on its card does not load the trained model: KL divergence", error)
        assert "allowed in float32: 1e-05" in error
    run = open_finished_run(tmp_path / "run").folder
    assert verify_manifest(run.adapter) is None
    assert run.read_results()["adapter_check"]["passed"] is False
    assert not run.has_merged(), "nothing is made of it unseen"


def test_saved_tokenizer_that_makes_other_tokens_is_named(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(tokenizer: Any, folder: Path, **settings: Any) -> None:
        original(tokenizer, folder, **settings)
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        digits = json.loads(pre_tokenizers.Digits(individual_digits=True).__getstate__())
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
        file.write_text(json.dumps(content))

    original = adapter_writer.save_tokenizer
    monkeypatch.setattr(adapter_writer, "save_tokenizer", lossy)
    with pytest.raises(
        ExportError, match=r"its tokenizer encodes text differently than the run's: '.*instead of"
    ) as caught:
        train_run(tmp_path, pico_llama, *STEPS)
    assert "\n" not in str(caught.value)


def test_run_killed_before_the_check_does_it_on_restart(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(pipeline, "check_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_run(tmp_path, pico_llama, *STEPS)
    before = messages.text
    assert "adapter check: passed" not in before
    run = train_run(tmp_path, pico_llama, *STEPS)
    assert run.read_results()["adapter_check"]["passed"]
    assert "training has finished already" in messages.text
    trained = adapter_bytes(run)
    assert run.read_results()["training"]["steps"] == 2
    assert trained == adapter_bytes(run)
    assert not list(run.path.glob(".adapter-check*"))


def test_model_is_loaded_by_the_code_and_no_other(pico_llama: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh_process.load_by(
        f"from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(pico_llama)!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(pico_llama)!r})\n"
    )
    assert not model.training
    assert tokenizer.chat_template
