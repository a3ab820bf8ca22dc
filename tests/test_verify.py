"""A merge is measured from its files, and the better base is kept."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_train.data.types import Example
from qlora_train.durable import MANIFEST, damage
from qlora_train.errors import MergeError
from qlora_train.evaluate import ExampleLoss, HeldOutLoss, held_out_loss
from qlora_train.export.merge import MARKER
from qlora_train.export.verify import MergeChoice, MergeRun, choose_merge_base, fits, load_merged, place_for
from tests.merging import (
    IDS,
    NF4,
    quantized,
    save_adapter,
)


def examples() -> list[Example]:
    """Held-out rows of random tokens, the second half of each labelled."""
    rows = [tuple(row.tolist()) for row in IDS]
    return [Example(f"row {i}", ids, (False,) * 8 + (True,) * 9, None, None) for i, ids in enumerate(rows)]


@dataclass
class Tuned:
    run: MergeRun
    loss: HeldOutLoss


@pytest.fixture
def tuned(pico_llama: Path, tmp_path: Path) -> Tuned:
    """An adapter on the 4-bit base, and its loss there."""
    adapter = save_adapter(quantized(pico_llama), tmp_path / "adapter", std=0.02)
    model = PeftModel.from_pretrained(quantized(pico_llama), adapter)
    loss = held_out_loss(model, examples(), batch_size=2, pad_token_id=0)
    return Tuned(MergeRun(pico_llama, adapter, NF4, torch.bfloat16), loss)


def choose(
    tuned: Tuned, output: Path, rows: list[Example], loss: HeldOutLoss | None, limit: float = 0.5, **changes: Any
) -> MergeChoice:
    options: dict[str, Any] = {"merge_base": "auto", "max_loss_increase": limit, "batch_size": 2, "finish": write_note}
    return choose_merge_base(tuned.run, output, examples=rows, adapter_loss=loss, **{**options, **changes})


def write_note(staging: Path, choice: MergeChoice) -> None:
    (staging / "note.json").write_text(json.dumps({"kept": choice.report.merge_base, **choice.losses}))


def test_auto_keeps_the_better_base_and_reports_both(tuned: Tuned, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    choice = choose(tuned, output, examples(), tuned.loss)
    kept = choice.report.merge_base
    assert set(choice.losses) == {"original", "dequantized"}
    assert choice.losses[kept] == min(choice.losses.values())
    assert json.loads((output / MARKER).read_text())["adapters"][0]["merge_base"] == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]
    again = held_out_loss(load_merged(output, "cpu"), examples(), batch_size=2, pad_token_id=0)
    assert again.loss == pytest.approx(choice.losses[kept], abs=1e-6)
    assert choice.losses["dequantized"] == pytest.approx(tuned.loss.loss, abs=0.02)


@pytest.mark.parametrize("measured", [True, False])
def test_what_is_added_to_a_merge_is_part_of_the_whole(tuned: Tuned, tmp_path: Path, measured: bool) -> None:
    output, rows = tmp_path / "merged", examples() if measured else []
    choice = choose(tuned, output, rows, tuned.loss if measured else None, merge_base="original")
    assert json.loads((output / "note.json").read_text()) == {"kept": "original", **choice.losses}
    assert damage(output) is None
    assert "note.json" in json.loads((output / MANIFEST).read_text())["files"]


def test_a_merge_that_cannot_be_finished_is_not_there(tuned: Tuned, tmp_path: Path) -> None:
    def full_disk(staging: Path, choice: MergeChoice) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        choose(tuned, tmp_path / "merged", [], None, finish=full_disk)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_folder_of_something_else_is_not_replaced(tuned: Tuned, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.tex").write_text("years of work")
    with pytest.raises(MergeError, match="not a previous merge"):
        choose(tuned, tmp_path / "merged", [], None)
    assert (tmp_path / "merged" / "thesis.tex").exists()


def test_weights_that_crowd_the_device_are_spread_to_host_memory(tmp_path: Path) -> None:
    gib = 2**30
    assert fits(13 * gib, 24 * gib)
    assert not fits(23 * gib, 24 * gib), "the activations need room too"
    assert not fits(140 * gib, 80 * gib)
    assert place_for(tmp_path, "cpu") == {"": torch.device("cpu")}


def test_a_merge_larger_than_the_gpu_is_measured_all_the_same(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned.run.merge(tmp_path / "merged", "original")
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (size // 2, size))
    assert place_for(tmp_path / "merged", "cuda:0") == "auto"
    on_cpu, spread = (load_merged(tmp_path / "merged", device) for device in ("cpu", "cuda:0"))
    expected = held_out_loss(on_cpu, examples(), batch_size=2, pad_token_id=0)
    found = held_out_loss(spread, examples(), batch_size=2, pad_token_id=0)
    assert found.loss == pytest.approx(expected.loss, abs=0.01)


@pytest.mark.parametrize(
    "on_device", [{"lm_head"}, {"model.embed_tokens"}, {"model.embed_tokens", "model.layers.0", "model.layers.1"}]
)
def test_a_model_with_parts_elsewhere_has_the_same_loss(pico_llama: Path, tmp_path: Path, on_device: set[str]) -> None:
    """The other parts wait elsewhere and are brought to the device when they are needed."""
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    whole = AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32)
    expected = held_out_loss(whole, examples(), batch_size=2, pad_token_id=0)
    elsewhere = {name: "cpu" if name in on_device else "disk" for name in names}
    model = dispatch_model(whole, elsewhere, main_device="cpu", offload_dir=str(tmp_path))
    assert held_out_loss(model, examples(), batch_size=2, pad_token_id=0).loss == pytest.approx(expected.loss, rel=1e-6)


def test_a_merge_that_costs_too_much_is_refused_with_both_numbers(tuned: Tuned, tmp_path: Path) -> None:
    better = HeldOutLoss.of([ExampleLoss(1.0, 10)])
    with pytest.raises(MergeError, match=r"after merging and 0\.1000 with the adapter.*allows 0\.02"):
        choose(tuned, tmp_path / "merged", examples(), better, limit=0.02)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_auto_without_held_out_rows_takes_what_was_trained(
    tuned: Tuned, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="qlora_train")
    choice = choose(tuned, tmp_path / "merged", [], None)
    assert (choice.report.merge_base, choice.losses) == ("dequantized", {})
    assert "no held-out rows" in caplog.text
    assert "not verified" in caplog.text
