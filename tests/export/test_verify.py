"""A merge is verified from its files, and the better base is kept."""

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_train.config.schema import ExportSection
from qlora_train.data.types import Example
from qlora_train.evaluation.held_out_loss import ExampleLoss, HeldOutLoss, held_out_loss, label_log_probabilities
from qlora_train.export import fresh_process
from qlora_train.export.merging import check_budget, verify
from qlora_train.export.merging import load_merged as loading
from qlora_train.export.merging.check_budget import bounded_reference
from qlora_train.export.merging.load_merged import choose_device_map, load_merged, streamed_bytes
from qlora_train.export.merging.merge_files import MARKER, merge_adapter
from qlora_train.export.merging.merge_quality import merge_results
from qlora_train.export.merging.verify import Finish, MergeResult, MergeRun, choose_merge_base
from qlora_train.export.predictions import Predictions, Reference, compared_rows, load_reference, measure_divergence
from qlora_train.utils import signals
from qlora_train.utils.atomic_io import MANIFEST, verify_manifest
from qlora_train.utils.errors import MergeError
from tests.support.merging import IDS, NF4, quantized, save_adapter


def examples() -> list[Example]:
    """Held-out rows of random tokens, the second half of each labelled."""
    rows = [tuple(row.tolist()) for row in IDS]
    return [Example(f"row {i}", ids, (False,) * 8 + (True,) * 9, None, None) for i, ids in enumerate(rows)]


@dataclass
class Tuned:
    run: MergeRun
    reference: Reference


@pytest.fixture(scope="module")
def measured(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """An adapter, measured on the 4-bit base."""
    adapter = save_adapter(quantized(pico_llama), tmp_path_factory.mktemp("tuned") / "adapter", std=0.02)
    model = PeftModel.from_pretrained(quantized(pico_llama), adapter)
    losses = held_out_loss(model, examples(), batch_size=2, pad_token_id=0)
    reference = Reference(examples(), True, losses, Predictions.of(model, compared_rows(examples())))
    return Tuned(MergeRun(pico_llama, adapter, NF4, torch.bfloat16), reference)


@pytest.fixture
def tuned(measured: Tuned) -> Tuned:
    """A copy whose reference a test may replace."""
    return replace(measured)


def with_loss(reference: Reference, loss: float) -> Reference:
    rows = [ExampleLoss(loss * row.num_tokens, row.num_tokens) for row in reference.losses.per_example]
    return replace(reference, losses=HeldOutLoss.of(rows))


def choose(tuned: Tuned, output: Path, finish: Finish | None = None, **export: Any) -> MergeResult:
    section = ExportSection(**{"max_loss_increase": 0.5, **export})
    return choose_merge_base(
        tuned.run, output, reference=tuned.reference, export=section, batch_size=2, finish=finish or write_note
    )


def write_note(staging: Path, choice: MergeResult) -> None:
    (staging / "note.json").write_text(json.dumps({"kept": choice.report.merge_base, **choice.losses}))


def test_auto_keeps_the_better_base_and_reports_both(tuned: Tuned, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    choice = choose(tuned, output)
    kept = choice.report.merge_base
    assert set(choice.losses) == {"original", "dequantized"}
    assert choice.losses[kept] == min(choice.losses.values())
    assert json.loads((output / MARKER).read_text())["adapters"][0]["merge_base"] == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    again = held_out_loss(load_merged(output, "cpu"), examples(), batch_size=2, pad_token_id=0)
    assert again.loss == pytest.approx(choice.losses[kept], abs=1e-6)
    assert choice.losses["dequantized"] == pytest.approx(tuned.reference.loss, abs=0.02)


def test_files_that_finish_adds_are_in_the_manifest(tuned: Tuned, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    choice = choose(tuned, output, merge_base="original")
    assert json.loads((output / "note.json").read_text()) == {"kept": "original", **choice.losses}
    assert verify_manifest(output) is None
    assert "note.json" in json.loads((output / MANIFEST).read_text())["files"]


def test_failure_in_finish_writes_nothing(tuned: Tuned, tmp_path: Path) -> None:
    def full_disk(staging: Path, choice: MergeResult) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        choose(tuned, tmp_path / "merged", full_disk)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_a_merge_is_not_replaced(tuned: Tuned, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.tex").write_text("years of work")
    with pytest.raises(MergeError, match="not a previous merge"):
        choose(tuned, tmp_path / "merged")
    assert (tmp_path / "merged" / "thesis.tex").exists()


@pytest.mark.parametrize(("weights_gb", "streamed_gb"), [(13, 0), (23, 1.4), (140, 118.4)])
def test_weights_that_do_not_fit_use_host_memory(
    weights_gb: int, streamed_gb: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The activations need room too."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (24e9, 24e9))
    monkeypatch.setattr(loading, "weights_bytes", lambda _folder: int(weights_gb * 1e9))
    assert streamed_bytes(tmp_path, "cuda:0") == pytest.approx(streamed_gb * 1e9)
    assert choose_device_map(tmp_path, "cuda:0") == ("auto" if streamed_gb else {"": torch.device("cuda:0")})
    assert choose_device_map(tmp_path, "cpu") == {"": torch.device("cpu")}


@pytest.mark.parametrize(
    ("device", "weights_gb", "checked", "message"),
    [
        ("cuda:0", 14, 3, None),
        (
            "cuda:0",
            1072,
            3,
            "checks 3 of 3 rows, at most about 10 min (1000.0 GB of weights cross PCIe per pass; --device",
        ),
        (
            "cuda:0",
            3072,
            2,
            "checks 2 of 3 rows, at most about 20 min (3000.0 GB of weights cross PCIe per pass; --device",
        ),
        ("cpu", 14, 3, None),
        ("cpu", 10_000, 2, "checks 2 of 3 rows, at most about 23 min (on the CPU)"),
    ],
)
def test_a_check_over_pcie_or_on_the_cpu_is_bounded_and_announced(
    device: str, weights_gb: int, checked: int, message: str | None, tuned: Tuned, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (80e9, 80e9))
    for module in (loading, check_budget):
        monkeypatch.setattr(module, "weights_bytes", lambda _folder: int(weights_gb * 1e9))
    monkeypatch.setattr(logging.getLogger("qlora_train"), "propagate", True)
    caplog.set_level("DEBUG", logger="qlora_train")
    bounded = bounded_reference(tuned.reference, tmp_path, device, min_label_tokens=10)  # of two rows
    assert len(bounded.rows) == checked
    assert (message in caplog.text) if message else not caplog.messages


def test_a_merge_in_host_memory_is_checked_there(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU that the fresh process sees does not matter."""
    seen: list[str] = []

    def check(where: Path, code: str, reference: Path, **_settings: Any) -> None:
        seen.append(code)
        raise MergeError("not loaded")

    monkeypatch.setattr(verify, "check_in_fresh_process", check)
    with pytest.raises(MergeError, match="not loaded"):
        choose(tuned, tmp_path / "merged", merge_base="original")
    assert 'device_map="cpu"' in seen[0]


def test_a_bounded_check_measures_the_same_rows_of_adapter_and_merge(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "bounded_reference", partial(bounded_reference, max_seconds=0, min_label_tokens=10))
    choice = choose(tuned, tmp_path / "merged", merge_base="dequantized")
    rows = tuned.reference.rows[:2]
    assert list(choice.reference.rows) == list(rows)
    assert merge_results(choice)["num_rows"] == len(rows) < len(tuned.reference.rows)
    assert choice.checks["dequantized"].divergence.num_tokens == 9 * len(rows)
    of_adapter = tuned.reference.losses.per_example[: len(rows)]
    assert choice.reference.loss == HeldOutLoss.of(of_adapter).loss
    again = held_out_loss(load_merged(tmp_path / "merged", "cpu"), rows, batch_size=2, pad_token_id=0)
    assert choice.losses["dequantized"] == pytest.approx(again.loss, abs=1e-6)


def test_merge_larger_than_the_gpu_is_measured(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_adapter(tuned.run, tmp_path / "merged", "original")
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (size // 2, size))
    assert choose_device_map(tmp_path / "merged", "cuda:0") == "auto"
    on_cpu, spread = (load_merged(tmp_path / "merged", device) for device in ("cpu", "cuda:0"))
    expected = held_out_loss(on_cpu, examples(), batch_size=2, pad_token_id=0)
    found = held_out_loss(spread, examples(), batch_size=2, pad_token_id=0)
    assert found.loss == pytest.approx(expected.loss, abs=0.01)


def test_device_map_auto_leaves_room_for_activations(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_adapter(tuned.run, tmp_path / "merged", "original")
    monkeypatch.setattr(loading, "choose_device_map", lambda *_: "auto")
    monkeypatch.setattr(loading, "get_max_memory", lambda: {0: 12_000, "cpu": 64_000})
    monkeypatch.setattr(loading, "available_bytes", lambda: 32_000)
    seen: dict[str, Any] = {}

    def load(_folder: Path, **settings: Any) -> None:
        seen.update(settings)
        raise InterruptedError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(InterruptedError):
        load_merged(tmp_path / "merged", "cuda:0")
    assert seen["max_memory"] == {0: 10_800, "cpu": 28_800}


@pytest.mark.parametrize(
    "on_device", [{"lm_head"}, {"model.embed_tokens"}, {"model.embed_tokens", "model.layers.0", "model.layers.1"}]
)
def test_offloaded_model_has_the_same_loss(pico_llama: Path, tmp_path: Path, on_device: set[str]) -> None:
    """The other parts wait elsewhere and are brought to the device when they are needed."""
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    whole = AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32)
    expected = held_out_loss(whole, examples(), batch_size=2, pad_token_id=0)
    elsewhere = {name: "cpu" if name in on_device else "disk" for name in names}
    model = dispatch_model(whole, elsewhere, main_device="cpu", offload_dir=str(tmp_path))
    assert held_out_loss(model, examples(), batch_size=2, pad_token_id=0).loss == pytest.approx(expected.loss, rel=1e-6)


def test_merge_with_a_higher_loss_is_refused_with_both_losses(tuned: Tuned, tmp_path: Path) -> None:
    tuned.reference = with_loss(tuned.reference, 0.1)
    with pytest.raises(
        MergeError, match=r"after merging onto \w+ \(\w+: [\d.]+\) and 0\.1000 with the adapter.*allows 0\.02"
    ):
        choose(tuned, tmp_path / "merged", max_loss_increase=0.02)
    assert list(tmp_path.iterdir()) == []


def test_without_held_out_rows_auto_merges_onto_the_dequantized_base(
    tuned: Tuned, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="qlora_train")
    tuned.reference = replace(tuned.reference, held_out=False)
    choice = choose(tuned, tmp_path / "merged")
    assert (choice.report.merge_base, list(choice.losses)) == ("dequantized", ["dequantized"])
    assert "no held-out rows" in caplog.text
    tuned.reference = with_loss(tuned.reference, 0.1)
    with pytest.raises(MergeError, match="training loss"):
        choose(tuned, tmp_path / "merged")


def change_merges(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """Let something happen to each merge after it was written."""
    original = verify.merge_adapter

    def changed(settings: MergeRun, output: Path, merge_base: Any) -> Any:
        report = original(settings, output, merge_base)
        change(output)
        return report

    monkeypatch.setattr(verify, "merge_adapter", changed)


def damage_tensor(how: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        name, other = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
        if how == "swapped":
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif how == "gone":
            del tensors[name]
        else:
            tensors[name].zero_()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


@pytest.mark.parametrize("how", ["zeroed", "swapped", "gone"])
def test_divergence_finds_damage_that_the_loss_misses(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    change_merges(monkeypatch, damage_tensor(how))
    with pytest.raises(MergeError, match=r"differs from the adapter.*export\.max_divergence allows 0\.02"):
        choose(tuned, tmp_path / "merged", merge_base="dequantized", max_loss_increase=10)
    assert list(tmp_path.iterdir()) == []


def test_merge_that_cannot_be_loaded_is_one_line(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_merges(monkeypatch, lambda folder: (folder / "model.safetensors").write_bytes(b"torn"))
    with pytest.raises(MergeError, match="the code on its card fails in a fresh process") as caught:
        choose(tuned, tmp_path / "merged")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("end", "said"), [(9, "was ended by signal 9"), (None, "ended with status 3")])
def test_a_check_that_dies_is_one_line(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: int | None, said: str
) -> None:
    monkeypatch.setattr(fresh_process, "_run", partial(die, end))
    with pytest.raises(MergeError, match=said) as caught:
        choose(tuned, tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def die(number: int | None, *_: Any) -> None:
    """Be the process of a check that ends before it answers."""
    os._exit(3) if number is None else os.kill(os.getpid(), number)


def test_a_stop_ends_the_check_too(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_process, "_run", wait_for_ever)
    monkeypatch.setattr(fresh_process, "POLL_SECONDS", 0.01)
    stop = signals.Stop("SIGTERM", 143)

    def checks() -> list[Any]:  # other children serve other tests
        return [child for child in multiprocessing.active_children() if child.name == "check of a saved model"]

    def asked() -> None:
        if any(process.is_alive() for process in checks()):
            raise stop

    monkeypatch.setattr(fresh_process.signals, "raise_if_requested", asked)
    with pytest.raises(signals.Stop):
        choose(tuned, tmp_path / "merged")
    assert checks() == []


def wait_for_ever(*_: Any) -> None:
    time.sleep(600)


def test_divergence_is_a_close_lower_bound_of_the_exact_one(pico_llama: Path, tmp_path: Path) -> None:
    rows = compared_rows(examples())
    model, other = (AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32).eval() for _ in range(2))
    other.model.layers[0].mlp.down_proj.weight.data *= 0.8
    Reference(rows, True, HeldOutLoss.of([]), Predictions.of(model, rows)).save(tmp_path / "file")
    again, predictions, _ = load_reference(tmp_path / "file")
    assert [row.input_ids.tolist() for row in again] == [row.input_ids.tolist() for row in rows]
    p, q = (torch.cat(list(label_log_probabilities(m, rows))).double() for m in (model, other))
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    found = measure_divergence(other, again, predictions)
    assert 0.9 * exact < found.kl <= exact + 1e-6, "256 of 320 tokens are compared one by one"
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.num_tokens == len(p) == 27
    assert measure_divergence(model, again, predictions).kl == pytest.approx(0, abs=1e-6)


def test_compared_rows_are_bounded_and_cut_at_their_last_label() -> None:
    rows = compared_rows(examples(), num_labels=13)
    assert [int(row.loss_mask.sum()) for row in rows] == [9, 4]
    assert [len(row.input_ids) for row in rows] == [17, 12]
