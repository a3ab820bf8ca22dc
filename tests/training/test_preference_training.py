"""Runs on preference pairs: resumed bitwise, with metrics of an independent model, and with the pair as the unit."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.integrations.neftune import activate_neftune

from qlora_train.adapters import load_trained
from qlora_train.data.collate import FlatteningCollator, StepCollator, TokenBudget, shared_prefix_length
from qlora_train.data.held_out_rows import load_rows
from qlora_train.data.token_store import Rows
from qlora_train.evaluation.objective_table import make_objective
from qlora_train.export.finished_run import open_finished_run
from qlora_train.models import load_model
from qlora_train.runs import RunFolder
from qlora_train.training.memory.worst_case_batch import worst_case_batches
from qlora_train.utils.eval_mode import eval_mode
from tests.support.label_logps import log_probability
from tests.support.preference_pairs import write_pairs
from tests.support.runs import adapter_bytes, make_config, metrics, stopped_copy, train_run
from tests.support.trainers import trainer_of

EXACT = "quantization.bnb_4bit_compute_dtype=float32"
BETA = 0.2
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def settings_for(folder: Path, *more: str) -> tuple[str, ...]:
    rows = folder / "pairs.jsonl"
    if not rows.exists():
        write_pairs(rows)
    return EXACT, f"data.train={rows}", "data.max_length=192", "train.objective=dpo", f"train.beta={BETA}", *more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preferences")


def test_run_says_how_many_tokens_shared_prompts_save(folder: Path, pico_llama: Path, messages: Any) -> None:
    run = train_run(folder, pico_llama, *settings_for(folder), "train.max_steps=1", name="says")
    rows = load_rows(run.rows).train
    prompts = sum(shared_prefix_length(pair, pair.rejected) for pair in rows if pair.rejected is not None)
    found = re.search(r"padding-free: on \(\d+ % fewer tokens, shared prefixes save (\d+) %", messages.text)
    assert found, messages.text
    # short flattened batches are padded to a multiple of 32 tokens, and pairs share a system prompt
    assert int(found[1]) == pytest.approx(100 * prompts / sum(pair.num_tokens for pair in rows), abs=12)


@pytest.fixture(scope="module")
def trained(folder: Path, pico_llama: Path) -> RunFolder:
    return train_run(folder, pico_llama, *settings_for(folder), "train.save_steps=4", name="trained")


def test_first_step_has_no_margin_and_training_gains_one(trained: RunFolder) -> None:
    first, *_, last, evaluated = metrics(trained)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert [first[name] for name in REWARDS[:3]] == pytest.approx([0, 0, 0], abs=1e-5)
    assert last["rewards/margins"] > 0.5 > last["loss"]
    assert evaluated["eval_rewards/accuracies"] > 0.9


def test_resumed_run_is_bitwise_equal_with_equal_metrics(trained: RunFolder, folder: Path, pico_llama: Path) -> None:
    stopped_copy(trained, folder / "stopped")
    resumed = train_run(folder, pico_llama, *settings_for(folder), "train.save_steps=4", name="stopped")
    assert adapter_bytes(resumed) == adapter_bytes(trained)
    measured = ("eval_runtime_seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
    without_times = [
        [{name: value for name, value in line.items() if name not in measured} for line in metrics(run)]
        for run in (resumed, trained)
    ]
    assert without_times[0] == without_times[1]


def test_reference_kernels_with_padding_train_the_same(trained: RunFolder, folder: Path, pico_llama: Path) -> None:
    plain = train_run(
        folder, pico_llama, *settings_for(folder), "train.fused_kernels=false", "train.padding_free=false", name="plain"
    )
    for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected"):
        found = [[line[name] for line in metrics(run) if name in line] for run in (plain, trained)]
        assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4), name


def test_evaluation_is_that_of_transformers_on_every_pair(trained: RunFolder) -> None:
    run = open_finished_run(trained.path)
    loaded = load_model(run.config.model, run.config.quantization, source=run.source)
    pairs = load_rows(trained.rows).eval
    base = np.array([[log_probability(loaded.model, each) for each in pair.sequences] for pair in pairs])
    model = load_trained(loaded, trained.adapter).eval()
    rewards = BETA * (np.array([[log_probability(model, each) for each in pair.sequences] for pair in pairs]) - base)
    margins = rewards[:, 0] - rewards[:, 1]
    evaluated = metrics(trained)[-1]
    expected = (*rewards.mean(0), margins.mean(), (margins > 0).mean())
    assert [evaluated[f"eval_{name}"] for name in REWARDS] == pytest.approx(expected, rel=1e-4)
    assert evaluated["eval_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)


ORPO = ("train.objective=orpo", "train.max_steps=4", "train.save_steps=2")


@pytest.fixture(scope="module")
def orpo(folder: Path, pico_llama: Path) -> RunFolder:
    return train_run(folder, pico_llama, *settings_for(folder), *ORPO, name="orpo")


def test_odds_and_chosen_answers_are_learnt_together(orpo: RunFolder) -> None:
    first, *_, last = [line for line in metrics(orpo) if "loss" in line]
    assert last["rewards/margins"] > first["rewards/margins"] + 0.05
    assert last["nll_loss"] < first["nll_loss"] - 0.5
    assert first["loss"] == pytest.approx(first["nll_loss"] - BETA * first["log_odds_ratio"], rel=1e-5)


def test_resumed_run_without_a_reference_is_bitwise_equal(orpo: RunFolder, folder: Path, pico_llama: Path) -> None:
    stopped_copy(orpo, folder / "orpo_stop")
    resumed = train_run(folder, pico_llama, *settings_for(folder), *ORPO, name="orpo_stop")
    assert adapter_bytes(resumed) == adapter_bytes(orpo)
    for name in ("loss", "nll_loss", "log_odds_ratio", "eval_loss", "eval_nll_loss"):
        found = [[line[name] for line in metrics(run) if name in line] for run in (resumed, orpo)]
        assert found[0] == found[1]
        assert found[0], name


def test_evaluation_of_odds_is_that_of_transformers(orpo: RunFolder) -> None:
    run = open_finished_run(orpo.path)
    loaded = load_model(run.config.model, run.config.quantization, source=run.source)
    model = load_trained(loaded, orpo.adapter).eval()
    pairs = load_rows(orpo.rows).eval
    logps = np.array([[log_probability(model, each) for each in pair.sequences] for pair in pairs])
    num_labels = np.array([[each.loss_mask.sum() for each in pair.sequences] for pair in pairs])
    probabilities = np.exp(logps / num_labels)
    odds = probabilities / (1 - probabilities)
    nll = -logps[:, 0].sum() / num_labels[:, 0].sum()
    odds_loss = -np.log(1 / (1 + odds[:, 1] / odds[:, 0])).mean()
    evaluated = metrics(orpo)[-1]
    assert evaluated["eval_nll_loss"] == pytest.approx(nll, rel=1e-4)
    assert evaluated["eval_log_odds_ratio"] == pytest.approx(-odds_loss, rel=1e-4)
    assert evaluated["eval_loss"] == pytest.approx(nll + BETA * odds_loss, rel=1e-4)


def test_micro_batches_do_not_change_a_loss_with_an_sft_term(folder: Path, pico_llama: Path) -> None:
    rows = write_pairs(folder / "ragged.jsonl", ragged=True)
    whole, divided = (
        train_run(
            folder, pico_llama, *settings_for(folder), f"data.train={rows}", "train.sft_weight=2", "train.max_steps=2",
            "train.eval_steps=9",
            "train.padding_free=false", f"train.per_device_train_batch_size={size}",
            f"train.gradient_accumulation_steps={6 // size}", name=f"by_{size}",
        )
        for size in (6, 1)
    )  # fmt: skip
    for name in ("loss", "grad_norm", "nll_loss", "rewards/margins"):
        found = [[line[name] for line in metrics(run) if name in line] for run in (divided, whole)]
        assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6), name
    first = metrics(divided)[0]
    assert first["loss"] == pytest.approx(np.log(2) + 2 * first["nll_loss"], rel=1e-5)


def test_preferences_after_sft_start_at_its_adapter(folder: Path, pico_llama: Path) -> None:
    sft = train_run(folder, pico_llama, EXACT, "train.max_steps=3", name="sft")
    run = train_run(
        folder, pico_llama, *settings_for(folder), f"lora.adapter_path={sft.adapter}", "train.max_steps=2",
        "train.save_steps=1", name="after",
    )  # fmt: skip
    first, *_ = metrics(run)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    stopped_copy(run, folder / "after_stop")
    resumed = train_run(
        folder, pico_llama, *settings_for(folder), f"lora.adapter_path={sft.adapter}", "train.max_steps=2",
        "train.save_steps=1", name="after_stop",
    )  # fmt: skip
    assert adapter_bytes(resumed) == adapter_bytes(run)


def test_no_micro_batch_of_pairs_is_larger_than_the_worst_case(folder: Path, pico_llama: Path) -> None:
    one_pair = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1")
    for more in (("train.padding_free=true",), ("train.padding_free=false",), one_pair):
        config = make_config(folder, pico_llama, *settings_for(folder), *more, name="worst")
        trainer, data = trainer_of(config)
        assert isinstance(data.train, Rows)
        worst = [batch["input_ids"].numel() for batch in worst_case_batches(trainer.batch_source, config)]
        batches = [batch for step in trainer.get_train_dataloader() for batch in step]
        assert max(batch["input_ids"].numel() for batch in batches) <= max(worst)
        assert sorted({int(row) for batch in batches for row in batch["row"]}) == list(range(len(data.train)))
        assert all(batch["sequence"].sum() * 2 == len(batch["sequence"]) for batch in batches), "a pair was divided"


def test_a_budget_regroups_whole_pairs(folder: Path, pico_llama: Path) -> None:
    _, data = trainer_of(make_config(folder, pico_llama, *settings_for(folder), name="budget"))
    assert isinstance(data.train, Rows)
    rows = list(enumerate(data.train[:12]))
    budget = TokenBudget(int(data.train.lengths.max()) * 2, 10**6)
    batches = StepCollator(FlatteningCollator(share_prefixes=True), budget)([[row] for row in rows])
    assert 1 < len(batches) < len(rows)
    for batch in batches:
        index, count = np.unique(batch["row"].numpy(), return_counts=True)
        assert (count == 2).all()
        expected = sum(rows[int(each)][1].num_labels for each in index)
        assert int(batch["num_labels"].sum()) == expected == int((batch["labels"] != -100).sum())


def test_noise_and_dropout_are_those_of_the_policy_alone(folder: Path, pico_llama: Path) -> None:
    config = make_config(folder, pico_llama, *settings_for(folder), "train.neftune_noise_alpha=50", name="noise")
    trainer, _ = trainer_of(config)
    loss = make_objective(config.train, config.lora, trainer.adapted.model).loss
    trainer.model.train()
    activate_neftune(trainer.model, 50, trainer.accelerator)
    batch = next(iter(trainer.get_train_dataloader()))[0]
    found = [loss(trainer.model, batch, chunk_tokens=None, with_aux_loss=False).metrics for _ in range(2)]
    with trainer.adapted.model.disable_adapter(), eval_mode(trainer.model):
        quiet = loss(trainer.model, batch, chunk_tokens=None, with_aux_loss=False).metrics
    for one in found:
        noise = float(one["logps/chosen"] - quiet["logps/chosen"])
        assert abs(noise) > 0.01
        assert float(one["rewards/chosen"]) == pytest.approx(BETA * noise, rel=1e-3)
