"""Token budget of padding-free micro-batches: 8,192 on a GPU, lowered if it does not fit, and resumed."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_train.runs import RunFolder
from qlora_train.training import padding_free
from qlora_train.training.memory import auto_batch_size
from qlora_train.training.memory.auto_batch_size import fitting_trainer, record_fallback
from qlora_train.training.memory.memory_probe import MemoryProbe, probe_memory
from qlora_train.training.memory.worst_case_batch import token_budget, worst_case_batches
from qlora_train.training.padding_free import min_tokens_on
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.errors import TrainingError
from tests.support.runs import adapter_bytes, losses, make_config, stopped_copy, train_run
from tests.support.trainers import trainer_of

A_ROW_AT_A_TIME = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=6")
BUDGET = 10_000
"""More tokens than a step has."""


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding_free, "min_tokens_on", lambda _device: BUDGET)


class Fitting:
    """A run with simulated memory.

    Attributes:
        budgets: of the trainers that were probed, in tokens.
    """

    def __init__(self, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = make_config(folder, base, *A_ROW_AT_A_TIME)
        self.run = RunFolder(Path(str(self.config.run.output_dir)))
        self.first, self._data = trainer_of(self.config)
        self.budgets: list[int] = []
        self._patch = monkeypatch

    def trainer(self, probe: Callable[[int], MemoryProbe]) -> QloraTrainer:
        """Fit a trainer; `probe` returns the result for a micro-batch of so many tokens."""

        def attempted(trainer: QloraTrainer) -> MemoryProbe:
            self.budgets.append(self.budget(trainer))
            return probe(self.budgets[-1])

        self._patch.setattr(auto_batch_size, "probe_memory", attempted)
        return fitting_trainer(
            lambda config: QloraTrainer(self.first.adapted, self._data, config, self.run, []), self.config, self.run
        )

    @staticmethod
    def budget(trainer: QloraTrainer) -> int:
        return trainer.batch_source.collate.budget.max_tokens  # type: ignore[attr-defined]


def test_only_a_gpu_raises_the_budget() -> None:
    assert min_tokens_on(torch.device("cpu")) == 0
    assert min_tokens_on(torch.device("cuda", 0)) == 8192


def test_budget_is_limited_to_the_tokens_of_a_step(pico_llama: Path, tmp_path: Path) -> None:
    trainer, data = trainer_of(make_config(tmp_path, pico_llama, *A_ROW_AT_A_TIME))
    lengths = np.sort(data.train.lengths)[::-1]  # type: ignore[union-attr]
    assert Fitting.budget(trainer) == lengths[:6].sum()
    few = token_budget(data.train, trainer.config, chunked_loss=True, min_tokens=2 * int(lengths[0]) + 1)  # type: ignore[arg-type]
    assert few.max_tokens == 2 * lengths[0] + 1
    for chunked_loss, min_tokens in (
        (True, 0),
        (True, 3),
        (False, BUDGET),
    ):  # without chunks more labels take more memory
        same = token_budget(data.train, trainer.config, chunked_loss=chunked_loss, min_tokens=min_tokens)  # type: ignore[arg-type]
        assert same.max_tokens == lengths[0]


def test_deterministic_runs_do_not_depend_on_free_memory(pico_llama: Path, tmp_path: Path) -> None:
    trainer, _ = trainer_of(make_config(tmp_path, pico_llama, *A_ROW_AT_A_TIME, "run.deterministic=true"))
    assert trainer.batch_source.collate.budget is None, "the micro-batches of the settings"  # type: ignore[union-attr]


def test_raised_budget_makes_fewer_micro_batches_within_the_worst_case(pico_llama: Path, tmp_path: Path) -> None:
    trainer, _ = trainer_of(make_config(tmp_path, pico_llama, *A_ROW_AT_A_TIME))
    assert isinstance(probe_memory(trainer), MemoryProbe)
    batches = worst_case_batches(trainer.batch_source, trainer.config)
    steps = list(trainer.get_train_dataloader())
    assert {len(step) for step in steps} == {1}
    for count in (lambda batch: batch["input_ids"].numel(), lambda batch: int((batch["labels"] != IGNORE_INDEX).sum())):
        assert max(map(count, batches)) >= max(map(count, chain.from_iterable(steps)))
    assert max(len(batch["row"]) for batch in batches) >= 6


def test_budget_that_does_not_fit_is_lowered(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: Any
) -> None:
    fitted = Fitting(tmp_path, pico_llama, monkeypatch)
    raised = Fitting.budget(fitted.first)
    trainer = fitted.trainer(lambda tokens: MemoryProbe("a batch", "CUDA out of memory" if tokens == raised else None))
    longest = int(trainer.examples.train.lengths.max())  # type: ignore[union-attr]
    assert fitted.budgets == [raised, longest]
    assert Fitting.budget(trainer) == longest
    assert not fitted.run.fitted_settings_file.exists(), "no setting is changed"
    assert "padding-free: token budget lowered to that of the settings (CUDA out of memory)" in messages.text
    assert json.loads(fitted.run.padding_free_file.read_text())["min_tokens"] == 0


def test_budget_that_leaves_no_room_for_fragmentation_is_lowered(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = Fitting(tmp_path, pico_llama, monkeypatch)
    raised = Fitting.budget(fitted.first)
    monkeypatch.setattr(auto_batch_size, "spare_bytes", lambda _device, peak_bytes: 100 - peak_bytes)
    monkeypatch.setattr(auto_batch_size, "relax_checkpointing", lambda _trainer, trial, _budget: trial)
    fitted.trainer(lambda tokens: MemoryProbe("a batch", None, 101 if tokens == raised else 50))
    assert len(fitted.budgets) == 2


@pytest.mark.parametrize("recomputed", [True, False])
def test_less_recomputation_comes_before_a_raised_budget(
    recomputed: bool, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = Fitting(tmp_path, pico_llama, monkeypatch)
    raised = Fitting.budget(fitted.first)

    def relax_checkpointing(trainer: QloraTrainer, trial: MemoryProbe, _budget: float) -> MemoryProbe:
        trainer.layer_checkpointing.set("full" if recomputed and Fitting.budget(trainer) == raised else "none")
        return replace(trial, batch="relaxed")

    monkeypatch.setattr(auto_batch_size, "spare_bytes", lambda *_: 100)
    monkeypatch.setattr(auto_batch_size, "relax_checkpointing", relax_checkpointing)
    trainer = fitted.trainer(lambda _: MemoryProbe("a batch", None, 50))
    assert (Fitting.budget(trainer) == raised) is not recomputed
    assert len(fitted.budgets) == 1 + recomputed


def test_out_of_memory_in_mid_run_lowers_the_budget_first(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = Fitting(tmp_path, pico_llama, monkeypatch)
    for message in ("the run resumes with smaller micro-batches", "no smaller setting is left|gradient_checkpointing"):
        with pytest.raises(TrainingError, match=message), record_fallback(fitted.first, fitted.config, fitted.run):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_resumed_run_keeps_its_budget_bitwise(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*A_ROW_AT_A_TIME, "train.max_steps=4", "train.save_steps=2")
    straight = train_run(tmp_path, pico_llama, *settings, name="straight")
    stopped_copy(straight, tmp_path / "stopped")
    monkeypatch.undo()  # the stored budget decides, not the device
    resumed = train_run(tmp_path, pico_llama, *settings, name="stopped")
    assert adapter_bytes(resumed) == adapter_bytes(straight)
    assert losses(resumed) == losses(straight)
    small = train_run(tmp_path, pico_llama, *settings, name="small")
    assert losses(small) == pytest.approx(losses(straight), rel=2e-2)
    assert adapter_bytes(small) != adapter_bytes(straight)
