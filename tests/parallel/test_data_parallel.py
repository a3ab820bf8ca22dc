"""Several processes train as one does: losses, gradients, rows, evaluation and token counts, for ten families."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_train.config import RunConfig
from tests.support.ranks_training import StepRecord, record_families, relative_difference, train_in_float16
from tests.support.runs import make_config, write_rows
from tests.support.workers import run_workers

DENSE = ("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "falcon", "cohere2")
MIXTURES = ("mixtral", "qwen3_moe", "granitemoe")
SETTINGS = (
    "quantization.bnb_4bit_compute_dtype=float32", "quantization.min_quantized_share=0", "data.eval=0.25",
    "train.gradient_accumulation_steps=4", "train.max_steps=1", "train.eval_steps=1", "train.save_steps=100",
)  # fmt: skip
VARIANTS = {
    "packing": ("data.packing=true", "data.max_length=64"),
    "padded": ("train.padding_free=false", "train.group_by_length=true"),
    "stream": ("data.streaming=true", "data.eval=null", "train.eval_steps=null"),
    "shared prefixes": ("train.per_device_train_batch_size=3",),
}
"""Other ways to make micro-batches, of one family."""
NO_DROPOUT = {"gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}
"""Dropout of the base draws other random numbers on each rank."""
MAX_DIFFERENCE = 1e-6
Records = dict[str, tuple[list[StepRecord], dict[str, Any]]]


@pytest.fixture(scope="module")
def configs(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("configs")
    families = {
        name: make_config(folder / name, pico(name, **NO_DROPOUT.get(name, {})), *SETTINGS)
        for name in (*DENSE, *MIXTURES)
    }
    variants = {
        name: make_config(folder / name, pico("llama"), *SETTINGS, *settings) for name, settings in VARIANTS.items()
    }
    return families | variants


@pytest.fixture(scope="module")
def alone(configs: dict[str, RunConfig]) -> Records:
    return record_families(configs, 1)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(
    request: pytest.FixtureRequest, configs: dict[str, RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> list[Records]:
    return run_workers(record_families, request.param, tmp_path_factory.mktemp("ranks"), configs, 1)


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES, *VARIANTS])
def test_loss_and_every_gradient_are_those_of_one_process(name: str, alone: Records, ranks: list[Records]) -> None:
    ((expected,), log), ((actual,), log_of_ranks) = alone[name], ranks[0][name]
    assert abs(actual.loss - expected.loss) <= MAX_DIFFERENCE * expected.loss
    assert all(rank[name][0][0].loss == actual.loss for rank in ranks)
    assert relative_difference(actual.gradients, expected.gradients) <= MAX_DIFFERENCE
    assert sorted(row for rank in ranks for row in rank[name][0][0].rows) == sorted(expected.rows)
    assert all(rank[name][0][0].rows for rank in ranks), "every rank has rows"
    assert log_of_ranks["tokens"] == log["tokens"]


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_evaluation_is_that_of_one_process(name: str, alone: Records, ranks: list[Records]) -> None:
    """After a step whose weights differ within rounding; the batches are the same."""
    (expected,) = [entry["eval_loss"] for entry in alone[name][1]["log"] if "eval_loss" in entry]
    losses = {entry["eval_loss"] for rank in ranks for entry in rank[name][1]["log"] if "eval_loss" in entry}
    assert len(losses) == 1, "all ranks have the same"
    assert losses.pop() == pytest.approx(expected, rel=1e-5)


def test_loss_scaler_of_a_rank_without_rows_is_that_of_the_others(pico: Callable[..., Path], tmp_path: Path) -> None:
    """As where a run resumes at the last, smaller step of an epoch."""
    rows = write_rows(tmp_path / "rows.jsonl", count=1)
    no_evaluation = ("data.eval=null", "train.eval_steps=null", "train.max_steps=1", "lora.lora_dropout=0")
    config = make_config(tmp_path, pico("llama"), *SETTINGS, *no_evaluation, f"data.train={rows}")
    expected, scaler = train_in_float16(config)
    for weights, scaler_of_rank in run_workers(train_in_float16, 2, tmp_path, config):
        assert relative_difference(weights, expected) <= MAX_DIFFERENCE
        assert scaler_of_rank == scaler
