"""Every family of the architecture table: load -> census -> adapter -> steps -> resume -> merge -> reload."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_train.adapter import load_trained
from qlora_train.architectures import ARCHITECTURES
from qlora_train.checkpoint import RunFolder
from qlora_train.export.merge import merge_adapter
from qlora_train.loader import load_model, resolve_base
from tests.pico import build_pico
from tests.runs import adapter_bytes, losses, make_config, train_run

SETTINGS = ("quantization.bnb_4bit_compute_dtype=float32", "train.max_steps=3", "train.save_steps=1")


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_family_goes_through_load_train_resume_and_merge(
    model_type: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico(model_type)
    straight = train_run(tmp_path, base, *SETTINGS, name="straight")
    assert losses(straight)[-1] < losses(straight)[0]

    shutil.copytree(straight.path, tmp_path / "stopped")
    stopped = RunFolder(tmp_path / "stopped")
    shutil.rmtree(stopped.adapter)
    shutil.rmtree(stopped.checkpoint(3))
    resumed = train_run(tmp_path, base, *SETTINGS, name="stopped")
    assert adapter_bytes(resumed) == adapter_bytes(straight)

    config = make_config(tmp_path, base, *SETTINGS, name="straight")
    loaded = load_model(config.model, config.quantization)
    assert loaded.architecture.known
    assert loaded.census.quantized_share == 1.0
    adapted = load_trained(loaded, straight.adapter)
    trained = {name.split(".lora_A")[0].rpartition(".")[2] for name in adapted.state_dict() if ".lora_A" in name}
    assert trained == set(loaded.architecture.linear_names)

    merge_adapter(
        resolve_base(config.model).folder,
        straight.adapter,
        tmp_path / "merged",
        merge_base="dequantized",
        quantization=config.quantization,
        dtype=torch.float32,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(40).reshape(2, 20) * 3 + 5
    with torch.no_grad():
        wanted, found = adapted(input_ids=ids).logits, merged.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_unknown_type_trains_on_the_generic_row_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = build_pico(tmp_path / "base", "stablelm")
    with caplog.at_level("WARNING"):
        run = train_run(tmp_path, base, *SETTINGS, "train.save_steps=100")
    assert losses(run)[-1] < losses(run)[0]
    warnings = [record.getMessage() for record in caplog.records if "stablelm" in record.getMessage()]
    assert len(warnings) == 1, warnings
