"""KTO's losses, metrics and gradients are those of TRL's `KTOTrainer` on the same rows, in float32."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from trl import KTOConfig, KTOTrainer

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.adapters.reference_model import base_model
from qlora_train.data.collate import FlatteningCollator, MismatchedRowDataset, PaddingCollator, collate_rows
from qlora_train.data.mismatched_rows import mismatched_batch, other_rows
from qlora_train.data.token_store import Rows
from qlora_train.data.types import Example
from qlora_train.kernels.packed import attention
from qlora_train.kernels.packed.row_positions import PACKED_ATTENTION
from qlora_train.models import resolve_base
from qlora_train.objectives.kto_loss import KL, METRICS, KtoLoss, margins
from qlora_train.planning.base_and_data import prepare_tokenizer_and_data
from tests.support.runs import adapted_model, make_config
from tests.support.trainers import DATE
from tests.support.unpaired_rows import write_labelled

Pico = Callable[..., Path]
Result = tuple[float, dict[str, float], dict[str, torch.Tensor]]
NUM_ROWS, MAX_LENGTH = 6, 1024
TOLERANCE = 1e-5
BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT = 0.3, 1.25, 2.0


class OracleTrainer(KTOTrainer):
    """TRL's trainer, on rows that are tokens already."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *_arguments: Any) -> datasets.Dataset:
        return dataset


def rows_of(base: Path, folder: Path) -> list[Example]:
    """Return rows as a step has them, each with the answer of another."""
    config = make_config(folder, base, f"data.train={write_labelled(folder / 'rows.jsonl')}", "train.objective=kto")
    data, _ = prepare_tokenizer_and_data(config, resolve_base(config.model), date=DATE)
    assert isinstance(data.train, Rows)
    rows = data.train[:NUM_ROWS]
    assert {row.desirable for row in rows} == {True, False}
    return [row for _, row in MismatchedRowDataset(rows, MAX_LENGTH)[other_rows(range(NUM_ROWS), ())]]


def as_trl(rows: Sequence[Example]) -> list[dict[str, Any]]:
    """Return rows in the columns of TRL's collator, without what follows an answer; TRL rotates the answers itself."""
    found = [
        {
            "prompt_ids": row.input_ids[: row.prompt_length].tolist(),
            "completion_ids": row.input_ids[row.loss_mask].tolist(),
            "label": row.desirable,
        }
        for row in rows
    ]
    answers = [each["completion_ids"] for each in found]
    rotated = [answers[-1], *answers[:-1]]
    return [{**each, "KL_completion_ids": other} for each, other in zip(found, rotated, strict=True)]


class Oracle:
    """TRL's loss, metrics and gradients, with a base of its own as the reference model."""

    def __init__(self, adapted: AdaptedModel, reference: Any, rows: Sequence[Example], folder: Path) -> None:
        values = {name: each.detach().clone() for name, each in trainable_state(adapted.model).items()}
        data = datasets.Dataset.from_list(as_trl(rows))
        self.trainer = OracleTrainer(
            adapted.model, reference, processing_class=adapted.loaded.tokenizer, train_dataset=data,
            args=KTOConfig(
                str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, max_length=None,
                router_aux_loss_coef=0.0, per_device_train_batch_size=NUM_ROWS,
            ),
        )  # fmt: skip
        for name, parameter in trainable_state(adapted.model).items():
            parameter.data = values[name]  # TRL rounds to bfloat16 on a 4-bit base
        self._batch = self.trainer.data_collator(list(data))

    def compute(self, loss_type: str) -> Result:
        """Return loss, metrics and gradients of all rows."""
        trainer: Any = self.trainer
        trainer.loss_type, trainer.calculate_KL = loss_type, loss_type == "kto"
        trainer.beta, trainer.desirable_weight, trainer.undesirable_weight = BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT
        trainer._metrics["train"].clear()
        trainer.model.train().zero_grad()
        loss = trainer.compute_loss(trainer.model, self._batch)
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        gradients = {
            name: each.grad.clone() for name, each in trainer.model.named_parameters() if each.grad is not None
        }
        return float(loss), metrics, gradients


def loss_of(name: str) -> KtoLoss:
    return KtoLoss(
        beta=BETA, desirable_weight=DESIRABLE_WEIGHT, undesirable_weight=UNDESIRABLE_WEIGHT,
        estimates_kl=name == "kto", reference=base_model,
    )  # fmt: skip


def compute(
    loss: KtoLoss, adapted: AdaptedModel, batch: dict[str, torch.Tensor], chunk_tokens: int | None = None
) -> Result:
    """Return our mean loss, metrics and gradients."""
    adapted.model.train().zero_grad()
    num_rows = loss.num_items(batch)
    if loss.estimates_kl:
        total = loss.kl_sum(adapted.model, mismatched_batch(batch), chunk_tokens=chunk_tokens)
        batch = {**batch, KL: (total / num_rows).clamp(min=0)}
    found = loss(adapted.model, batch, chunk_tokens=chunk_tokens, with_aux_loss=False)
    (found.total / num_rows).backward()
    metrics = {name: float(value) / found.metric_counts.get(name, num_rows) for name, value in found.metrics.items()}
    gradients = {
        name: each.grad.clone() for name, each in trainable_state(adapted.model).items() if each.grad is not None
    }
    return float(found.total) / num_rows, metrics | margins(metrics), gradients


def check_equal(actual: Result, expected: Result) -> None:
    """Compare loss, the metrics that we have, and every gradient relative to the largest."""
    assert actual[0] == pytest.approx(expected[0], rel=TOLERANCE)
    names = set(METRICS) if KL in actual[1] else set(METRICS) - {KL}
    assert actual[1].keys() == names
    assert actual[1] == pytest.approx({name: expected[1][name] for name in names}, rel=TOLERANCE, abs=TOLERANCE)
    assert actual[2].keys() == expected[2].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[2].values())
    assert largest > 1e-3
    for name, gradient in expected[2].items():
        assert float((actual[2][name] - gradient).abs().max()) <= TOLERANCE * largest, name


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_loss_metrics_and_gradients_are_those_of_trl(family: str, pico: Pico, tmp_path: Path) -> None:
    base = pico(family)
    rows = rows_of(base, tmp_path)
    adapted, theirs, reference = (adapted_model(tmp_path, base) for _ in range(3))
    oracle = Oracle(theirs, reference.model.unload(), rows, tmp_path / "trl")
    batch = collate_rows(PaddingCollator(0), list(enumerate(rows)))
    divergences = []
    for sign in (1, -1):  # of one model the estimate is above 0, of the other it is clamped
        for each in (adapted, theirs):
            for name, parameter in trainable_state(each.model).items():
                parameter.data *= sign if "lora_B" in name else 1
        for name in ("kto", "apo_zero_unpaired"):
            expected = oracle.compute(name)
            check_equal(compute(loss_of(name), adapted, batch), expected)
            if name == "kto":
                divergences.append(expected[1][KL])
    assert max(divergences) > 0.01, divergences


def test_prompts_computed_once_give_the_same_loss_and_gradients(pico_llama: Path, tmp_path: Path) -> None:
    rows = rows_of(pico_llama, tmp_path)
    adapted, loss = adapted_model(tmp_path, pico_llama), loss_of("kto")
    padded = compute(loss, adapted, collate_rows(PaddingCollator(0), list(enumerate(rows))))
    attention.register()
    adapted.loaded.model.set_attn_implementation(PACKED_ATTENTION)
    batch = collate_rows(FlatteningCollator(share_prefixes=True), list(enumerate(rows)))
    assert batch["input_ids"].numel() < sum(row.num_tokens for row in rows)
    assert batch["row"].tolist() != list(range(NUM_ROWS)), "rows are in the order of the file"
    for chunk_tokens in (None, 7):
        check_equal(compute(loss, adapted, batch, chunk_tokens), padded)


def test_one_kind_of_rows_has_no_metrics_of_the_other(pico_llama: Path, tmp_path: Path) -> None:
    rows = [row for row in rows_of(pico_llama, tmp_path) if row.desirable]
    adapted = adapted_model(tmp_path, pico_llama)
    _, metrics, _ = compute(loss_of("kto"), adapted, collate_rows(PaddingCollator(0), list(enumerate(rows))))
    assert metrics.keys() == {KL, "rewards/chosen", "logps/chosen"}
