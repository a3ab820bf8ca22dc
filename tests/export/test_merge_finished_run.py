"""A finished run is merged atomically, with a card, measurements and one model in memory at a time."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from qlora_train.export.merging import merge_finished_run as run_module
from qlora_train.export.merging import verify
from qlora_train.export.merging.verify import MergeResult
from qlora_train.runs import RunFolder
from qlora_train.utils.atomic_io import MANIFEST, verify_manifest
from tests.support.runs import train_run


def merge(run: RunFolder) -> MergeResult:
    return run_module.merge(run.path, device="cpu")


def test_merged_run_has_its_card_and_results(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_run(tmp_path, pico_llama, "train.max_steps=2", "quantization.bnb_4bit_compute_dtype=bfloat16")
    alive: list[bool] = []
    original = verify.merge_adapter

    def counted(*arguments: Any) -> Any:
        alive.append(any(isinstance(thing, PeftModel) for thing in gc.get_objects()))
        return original(*arguments)

    monkeypatch.setattr(verify, "merge_adapter", counted)
    result = merge(run)
    assert alive == [False, False], "the measured adapter model is gone before a merge begins"
    results = run.read_results()["merge"]
    assert results["merge_base"] == result.report.merge_base
    card = (run.merged / "README.md").read_text(encoding="utf-8")
    assert f"| adapter on the base it was trained on | {results['adapter_loss']:.4g} |" in card
    for kind in ("original", "dequantized"):
        loss, same = (results["candidates"][kind][key] for key in ("loss", "top1_agreement"))
        this = " (this model)" if kind == results["merge_base"] else ""
        assert f"| merged onto the {kind} base{this} | {loss:.4g} | " in card
        assert f" | {100 * same:.1f} % |" in card
    assert results["rows"] == "held-out"
    divergences = {kind: measured["kl_divergence"] for kind, measured in results["candidates"].items()}
    assert 0 <= divergences["dequantized"] < divergences["original"]
    assert verify_manifest(run.merged) is None
    assert "README.md" in json.loads((run.merged / MANIFEST).read_text())["files"]

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(path.name for path in run.path.iterdir())
    monkeypatch.setattr(run_module, "write_card", full_disk)
    with pytest.raises(OSError, match="No space"):
        merge(run)
    assert verify_manifest(run.merged) is None
    assert sorted(path.name for path in run.path.iterdir()) == before


def test_run_without_held_out_rows_is_checked_on_training_rows(
    pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="qlora_train")
    unheld = ("data.eval=null", "train.eval_steps=null")
    run = train_run(tmp_path, pico_llama, *unheld, "train.max_steps=1", "export.merge=true")
    results = run.read_results()["merge"]
    assert (results["merge_base"], results["rows"]) == ("dequantized", "training")
    assert results["candidates"]["dequantized"]["kl_divergence"] < 0.05
    assert "24 training rows (none were held out)" in caplog.text
    assert "24 training rows (none were held out)" in (run.merged / "README.md").read_text(encoding="utf-8")
