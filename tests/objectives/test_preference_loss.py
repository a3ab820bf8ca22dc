"""Preference losses, metrics and gradients are those of TRL's `DPOTrainer` on the same pairs, in float32."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from trl import DPOConfig, DPOTrainer

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.adapters.reference_model import InitialAdapter, base_model
from qlora_train.data.collate import FlatteningCollator, PaddingCollator, collate_rows
from qlora_train.data.token_store import Rows
from qlora_train.data.types import Example
from qlora_train.kernels.packed import attention
from qlora_train.kernels.packed.row_positions import PACKED_ATTENTION
from qlora_train.models import resolve_base
from qlora_train.objectives.preference_loss import METRICS, PAIR_LOSSES, PreferenceLoss
from qlora_train.planning.base_and_data import prepare_tokenizer_and_data
from tests.support.preference_pairs import write_pairs
from tests.support.runs import adapted_model, make_config
from tests.support.trainers import DATE

Pico = Callable[..., Path]
NUM_PAIRS = 5
TOLERANCE = 1e-5
FAMILIES = ("llama", "gemma2", "qwen3", "gpt_neox", "phi3", "qwen3_moe")
SETTINGS = {"beta": 0.3, "label_smoothing": 0.1}


class OracleTrainer(DPOTrainer):
    """TRL's trainer, on rows that are tokens already."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *_arguments: Any) -> datasets.Dataset:
        return dataset


def pairs_of(base: Path, folder: Path) -> list[Example]:
    config = make_config(folder, base, f"data.train={write_pairs(folder / 'pairs.jsonl')}", "train.objective=dpo")
    data, _ = prepare_tokenizer_and_data(config, resolve_base(config.model), date=DATE)
    assert isinstance(data.train, Rows)
    return list(data.train[:NUM_PAIRS])


def as_trl(pair: Example) -> dict[str, list[int]]:
    """Return a pair in the columns of TRL's collator, without what follows an answer."""
    labels = [sequence.loss_mask.nonzero()[0] for sequence in pair.sequences]
    answers = [sequence.input_ids[where].tolist() for sequence, where in zip(pair.sequences, labels, strict=True)]
    prompt = pair.input_ids[: labels[0][0]].tolist()
    return {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}


class Oracle:
    """TRL's loss, metrics and gradients, with a base of its own as the reference model."""

    def __init__(self, adapted: AdaptedModel, reference: Any, pairs: Sequence[Example], folder: Path) -> None:
        values = {name: each.detach().clone() for name, each in trainable_state(adapted.model).items()}
        rows = datasets.Dataset.from_list([as_trl(pair) for pair in pairs])
        self.trainer = OracleTrainer(
            adapted.model, reference, processing_class=adapted.loaded.tokenizer, train_dataset=rows,
            args=DPOConfig(
                str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, max_length=None,
                router_aux_loss_coef=0.0,
            ),
        )  # fmt: skip
        for name, parameter in trainable_state(adapted.model).items():
            parameter.data = values[name]  # TRL rounds to bfloat16 on a 4-bit base
        self._batch = self.trainer.data_collator(list(rows))

    def compute(self, loss_type: str) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
        """Return loss, metrics and gradients of all pairs."""
        trainer: Any = self.trainer
        trainer.loss_types, trainer.beta, trainer.label_smoothing = [loss_type], *SETTINGS.values()
        trainer._metrics["train"].clear()
        trainer.model.train().zero_grad()
        loss = trainer.compute_loss(trainer.model, self._batch)
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        gradients = {
            name: each.grad.clone() for name, each in trainer.model.named_parameters() if each.grad is not None
        }
        return float(loss), metrics, gradients


def loss_of(name: str, reference: Any = base_model) -> PreferenceLoss:
    label_smoothing = SETTINGS["label_smoothing"] if name == "robust" else 0.0
    return PreferenceLoss(name, beta=SETTINGS["beta"], label_smoothing=label_smoothing, reference=reference)


def compute(
    loss: PreferenceLoss, adapted: AdaptedModel, batch: dict[str, torch.Tensor], chunk_tokens: int | None = None
) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Return our mean loss, metrics and gradients."""
    adapted.model.train().zero_grad()
    found = loss(adapted.model, batch, chunk_tokens=chunk_tokens, with_aux_loss=False)
    num_pairs = loss.num_items(batch)
    (found.total / num_pairs).backward()
    metrics = {name: float(value) / num_pairs for name, value in found.metrics.items()}
    gradients = {
        name: each.grad.clone() for name, each in trainable_state(adapted.model).items() if each.grad is not None
    }
    return float(found.total) / num_pairs, metrics, gradients


def check_equal(actual: Any, expected: Any) -> None:
    """Compare loss, the metrics that we have, and every gradient relative to the largest."""
    assert actual[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert actual[1] == pytest.approx({name: expected[1][name] for name in METRICS}, rel=TOLERANCE, abs=TOLERANCE)
    assert actual[2].keys() == expected[2].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[2].values())
    assert largest > 1e-3
    for name, gradient in expected[2].items():
        assert float((actual[2][name] - gradient).abs().max()) <= TOLERANCE * largest, name


def indexed(pairs: Sequence[Example]) -> list[tuple[int, Example]]:
    return list(enumerate(pairs))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_metrics_and_gradients_are_those_of_trl(family: str, pico: Pico, tmp_path: Path) -> None:
    base = pico(family)
    pairs = pairs_of(base, tmp_path)
    adapted, theirs, reference = (adapted_model(tmp_path, base) for _ in range(3))
    expected = Oracle(theirs, reference.model.unload(), pairs, tmp_path / "trl")
    batch = collate_rows(PaddingCollator(0), indexed(pairs))
    for name in PAIR_LOSSES if family == "llama" else ("dpo",):
        trl_name = "sigmoid" if name == "dpo" else name
        check_equal(compute(loss_of(name), adapted, batch), expected.compute(trl_name))


def test_prompts_computed_once_give_the_same_loss_and_gradients(pico_llama: Path, tmp_path: Path) -> None:
    pairs = pairs_of(pico_llama, tmp_path)
    adapted, loss = adapted_model(tmp_path, pico_llama), loss_of("dpo")
    apart = compute(loss, adapted, collate_rows(PaddingCollator(0), indexed(pairs)))
    attention.register()
    adapted.loaded.model.set_attn_implementation(PACKED_ATTENTION)
    batch = collate_rows(FlatteningCollator(share_prefixes=True), indexed(pairs))
    assert (
        batch["input_ids"].numel()
        < sum(pair.num_tokens for pair in pairs) - sum(pair.loss_mask.argmax() for pair in pairs) / 2
    )
    for chunk_tokens in (None, 7):
        actual = compute(loss, adapted, batch, chunk_tokens)
        check_equal(actual, apart)


def test_an_adapter_to_start_from_is_the_reference(pico_llama: Path, tmp_path: Path) -> None:
    pairs = pairs_of(pico_llama, tmp_path)
    adapted = adapted_model(tmp_path, pico_llama)
    batch = collate_rows(PaddingCollator(0), indexed(pairs))
    initial = {name: each.detach().clone() for name, each in trainable_state(adapted.model).items()}
    reference = InitialAdapter(adapted.model)
    loss, metrics, _ = compute(loss_of("dpo", reference), adapted, batch)
    assert (loss, metrics["rewards/margins"]) == (pytest.approx(0.693147, abs=1e-5), pytest.approx(0, abs=1e-5))
    for parameter in trainable_state(adapted.model).values():
        parameter.data *= 1.5
    moved = compute(loss_of("dpo", reference), adapted, batch)
    with torch.no_grad(), reference(adapted.model):
        assert all(torch.equal(each, initial[name]) for name, each in trainable_state(adapted.model).items())
    assert abs(moved[1]["rewards/chosen"]) > 0.01
    assert all(torch.equal(each, 1.5 * initial[name]) for name, each in trainable_state(adapted.model).items())


def test_the_reference_is_another_model_inside_an_outer_autocast(pico_llama: Path, tmp_path: Path) -> None:
    adapted = adapted_model(tmp_path, pico_llama, dtype="bfloat16")
    reference = InitialAdapter(adapted.model)
    initial = {name: each.detach().clone() for name, each in trainable_state(adapted.model).items()}
    for parameter in trainable_state(adapted.model).values():
        parameter.data *= -4
    trained = {name: each.detach().clone() for name, each in trainable_state(adapted.model).items()}
    ids = torch.arange(1, 9)[None]

    def outputs(values: dict[str, torch.Tensor]) -> torch.Tensor:
        for name, parameter in trainable_state(adapted.model).items():
            parameter.data = values[name].clone()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return adapted.model(input_ids=ids).logits

    expected = outputs(initial), outputs(trained)
    assert not torch.equal(*expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with reference(adapted.model):
            found = adapted.model(input_ids=ids).logits
        assert torch.equal(found, expected[0])
        assert torch.equal(adapted.model(input_ids=ids).logits, expected[1])
