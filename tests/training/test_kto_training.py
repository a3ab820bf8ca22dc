"""KTO runs: resumed bitwise, the same for any micro-batches, and with metrics of an independent model."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_train.adapters import load_trained, trainable_state
from qlora_train.data.collate import FlatteningCollator, StepCollator, TokenBudget
from qlora_train.data.held_out_rows import load_rows
from qlora_train.data.mismatched_rows import MISMATCHED, mismatched_sequence
from qlora_train.data.token_store import Rows
from qlora_train.export.finished_run import open_finished_run
from qlora_train.inference.eval_report import EvalSettings, evaluate
from qlora_train.models import load_model
from qlora_train.runs import RunFolder
from qlora_train.training.batch_source import RowBatches
from qlora_train.training.memory.worst_case_batch import worst_case_batches
from tests.support.label_logps import log_probability
from tests.support.runs import adapter_bytes, make_config, metrics, stopped_copy, train_run
from tests.support.trainers import trainer_of
from tests.support.unpaired_rows import labelled, write_labelled

EXACT = "quantization.bnb_4bit_compute_dtype=float32"
BETA, WEIGHT = 0.2, 1.5
ONE_BATCH = ("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1")


def settings_for(folder: Path, *more: str) -> tuple[str, ...]:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_labelled(rows)
    return (
        EXACT, f"data.train={rows}", "data.max_length=192", "train.objective=kto", f"train.beta={BETA}",
        f"train.undesirable_weight={WEIGHT}", "train.save_steps=4", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kto")


@pytest.fixture(scope="module")
def trained(folder: Path, pico_llama: Path) -> RunFolder:
    return train_run(folder, pico_llama, *settings_for(folder), name="trained")


def without_times(run: RunFolder) -> list[dict[str, Any]]:
    measured = ("eval_runtime_seconds", "tokens_per_second", "peak_memory_bytes", "mfu")
    return [{name: value for name, value in line.items() if name not in measured} for line in metrics(run)]


def test_first_step_has_no_rewards_and_training_gains_a_margin(trained: RunFolder) -> None:
    first, *_, last, evaluated = metrics(trained)
    rewards = [first[name] for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins")]
    assert rewards == pytest.approx([0] * 4, abs=1e-5)
    assert 0.5 <= first["loss"] <= 0.5 * WEIGHT
    assert last["rewards/margins"] > 0.2
    assert evaluated["eval_rewards/margins"] > 0.1
    assert any(line["kl"] > 0 for line in metrics(trained) if "kl" in line)


def test_resumed_run_is_bitwise_equal_with_equal_metrics(trained: RunFolder, folder: Path, pico_llama: Path) -> None:
    stopped_copy(trained, folder / "stopped")
    resumed = train_run(folder, pico_llama, *settings_for(folder), name="stopped")
    assert adapter_bytes(resumed) == adapter_bytes(trained)
    assert without_times(resumed) == without_times(trained)


@pytest.mark.parametrize(
    "settings",
    [
        ("train.fused_kernels=false", "train.padding_free=false", *ONE_BATCH),
        ("train.padding_free=false", "train.gradient_accumulation_steps=4", "train.per_device_train_batch_size=1"),
        ("train.gradient_checkpointing=full",),
    ],
    ids=["one padded micro-batch", "rows alone", "checkpointing"],
)
def test_the_division_of_a_step_does_not_change_the_run(
    settings: tuple[str, ...], trained: RunFolder, folder: Path, pico_llama: Path, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id.replace(" ", "_")
    other = train_run(folder, pico_llama, *settings_for(folder, *settings), name=name)
    for key in ("loss", "kl", "rewards/margins", "logps/chosen", "logps/rejected", "eval_loss", "eval_kl"):
        found = [[line[key] for line in metrics(run) if key in line] for run in (other, trained)]
        assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4), key


def test_evaluation_is_that_of_transformers_on_every_row(trained: RunFolder) -> None:
    run = open_finished_run(trained.path)
    loaded = load_model(run.config.model, run.config.quantization, source=run.source)
    rows = list(load_rows(trained.rows).eval)
    others = [mismatched_sequence(row, rows[index - 1], 192) for index, row in enumerate(rows)]
    base = np.array([[log_probability(loaded.model, each) for each in (*rows, *others)]])
    model = load_trained(loaded, trained.adapter).eval()
    policy = np.array([[log_probability(model, each) for each in (*rows, *others)]])
    ratios, mismatched = np.split((policy - base)[0], 2)
    kl = max(0.0, mismatched.mean())
    label = np.array([row.desirable for row in rows])
    assert label.any()
    assert not label.all()
    gain = BETA * (ratios - kl)
    expected = np.where(label, 1 / (1 + np.exp(gain)), WEIGHT / (1 + np.exp(-gain)))
    evaluated = metrics(trained)[-1]
    assert evaluated["eval_loss"] == pytest.approx(expected.mean(), rel=1e-4)
    assert evaluated["eval_kl"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
    rewards = [BETA * ratios[label].mean(), BETA * ratios[~label].mean()]
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins")
    assert [evaluated[f"eval_{name}"] for name in names] == pytest.approx([*rewards, rewards[0] - rewards[1]], rel=1e-4)


def test_losses_of_rows_are_recorded_with_their_labels(trained: RunFolder) -> None:
    recorded = json.loads(trained.row_losses_file.read_text())["eval"]
    assert recorded["num_measured"] == len(load_rows(trained.rows).eval)
    shown = {each["where"].rpartition(" ")[2] for row in recorded["rows"] for each in row["sequences"]}
    assert shown == {"(desirable)", "(undesirable)"}


def test_losses_of_rows_have_the_mean_that_evaluation_reports(folder: Path, pico_llama: Path) -> None:
    config = make_config(folder, pico_llama, *settings_for(folder), name="rows")
    trainer, data = trainer_of(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_state(trainer.model).values():
        parameter.data -= 0.05 * torch.randn(parameter.shape, generator=generator)
    arguments: dict[str, Any] = {"batch_size": 3, "pad_token_id": 0}
    losses = trainer.objective.row_losses(trainer.model, data.eval, **arguments)
    means = trainer.objective.evaluate(trainer.model, data.eval, **arguments)
    assert means["kl"] > 0.01
    assert statistics.mean(losses) == pytest.approx(means["loss"], rel=1e-5)


def test_eval_measures_desirable_answers(trained: RunFolder) -> None:
    results = evaluate(trained.path, EvalSettings(models=("adapter",), generate=False))
    desirable = [row for row in load_rows(trained.rows).eval if row.desirable]
    assert results["adapter"]["num_tokens"] == sum(row.num_labels for row in desirable)


def test_answers_of_a_step_are_those_of_its_rows(folder: Path, pico_llama: Path) -> None:
    trainer, data = trainer_of(make_config(folder, pico_llama, *settings_for(folder), name="order"))
    source = trainer.batch_source
    assert isinstance(source, RowBatches)
    assert isinstance(data.train, Rows)
    for step in source.epoch_steps(0):
        pairs = [pair for batch in step for pair in batch]
        assert sorted(row for row, _ in pairs) == sorted(other for _, other in pairs) or len(pairs) == 1
        assert all(row != other for row, other in pairs)


def test_no_micro_batch_is_larger_than_the_worst_case(folder: Path, pico_llama: Path) -> None:
    """A long prompt with the long answer of another row is longer than both rows."""
    question, answer = ({"role": role, "content": "nine words " * 7} for role in ("user", "assistant"))
    longer = [{**labelled(1)[0], "prompt": [question]}, {**labelled(1)[0], "completion": [answer], "label": False}]
    file = folder / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*labelled(18), *longer * 3]))
    for more in (("train.padding_free=true",), ("train.padding_free=false",), ONE_BATCH):
        settings = (*settings_for(folder), f"data.train={file}", "data.eval=null", "train.eval_steps=null", *more)
        config = make_config(folder, pico_llama, *settings, name="worst")
        trainer, data = trainer_of(config)
        assert isinstance(data.train, Rows)
        worst = worst_case_batches(trainer.batch_source, config)
        assert data.train.max_mismatched_length > data.train.lengths.max()
        batches = [batch for step in trainer.get_train_dataloader() for batch in step]
        for name in ("input_ids", f"{MISMATCHED}input_ids"):
            assert max(batch[name].numel() for batch in batches) <= max(batch[name].numel() for batch in worst)
        assert sorted(int(row) for batch in batches for row in batch["row"]) == list(range(len(data.train)))


def test_a_budget_counts_the_longer_of_both_sequences(folder: Path, pico_llama: Path) -> None:
    _, data = trainer_of(make_config(folder, pico_llama, *settings_for(folder), name="budget"))
    assert isinstance(data.train, Rows)
    rows = data.train[:12]
    short, long = sorted(rows, key=lambda row: row.num_tokens)[:: len(rows) - 1]
    examples = [short.with_mismatched(mismatched_sequence(short, long, 1024)) for _ in range(6)]
    budget = TokenBudget(2 * max(each.num_tokens for each in (examples[0].mismatched, short) if each), 10**6)
    steps = [[row] for row in enumerate(examples)]
    batches = StepCollator(FlatteningCollator(), budget)(steps)
    assert len(batches) == 3
    assert all(batch[f"{MISMATCHED}input_ids"].numel() <= budget.max_tokens for batch in batches)
