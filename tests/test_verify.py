"""A merge is measured from its files, and the better base is kept."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlora_train.data.types import Example
from qlora_train.errors import MergeError
from qlora_train.evaluate import ExampleLoss, HeldOutLoss, held_out_loss
from qlora_train.export.merge import MARKER
from qlora_train.export.verify import MergeRun, choose_merge_base, verify_merge
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


def choose(tuned: Tuned, output: Path, rows: list[Example], loss: HeldOutLoss | None, limit: float = 0.5) -> Any:
    return choose_merge_base(
        tuned.run, output, merge_base="auto", examples=rows, adapter_loss=loss, max_loss_increase=limit, batch_size=2
    )


def test_auto_keeps_the_better_base_and_reports_both(tuned: Tuned, tmp_path: Path) -> None:
    choice = choose(tuned, tmp_path / "merged", examples(), tuned.loss)
    assert set(choice.losses) == {"original", "dequantized"}
    assert choice.losses[choice.report.merge_base] == min(choice.losses.values())
    marker = json.loads((tmp_path / "merged" / MARKER).read_text())
    assert marker["adapters"][0]["merge_base"] == choice.report.merge_base
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]
    verification = verify_merge(
        tmp_path / "merged", examples(), tuned.loss,
        max_loss_increase=0.5, dtype=torch.bfloat16, device="cpu", batch_size=2,
    )  # fmt: skip
    assert verification.merged_loss == pytest.approx(choice.verification.merged_loss, abs=1e-6)
    assert choice.losses["dequantized"] == pytest.approx(tuned.loss.loss, abs=0.02)


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
    assert (choice.report.merge_base, choice.losses, choice.verification) == ("dequantized", {}, None)
    assert "no held-out rows" in caplog.text
    assert "not verified" in caplog.text
