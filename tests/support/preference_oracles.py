"""Preference losses of TRL's trainers and of this package on the same pairs, for comparison."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.adapters.reference_model import base_model
from qlora_train.config.objectives import OBJECTIVES
from qlora_train.data.token_store import Rows
from qlora_train.data.types import Example
from qlora_train.models import resolve_base
from qlora_train.objectives.batch_loss import SFT_LOSS
from qlora_train.objectives.preference_loss import METRICS, PreferenceLoss
from qlora_train.planning.base_and_data import prepare_tokenizer_and_data
from tests.support.preference_pairs import write_pairs
from tests.support.runs import make_config
from tests.support.trainers import DATE

Result = tuple[float, dict[str, float], dict[str, torch.Tensor]]
"""Loss, metrics and gradients."""
NUM_PAIRS = 5
TOLERANCE = 1e-5
SETTINGS = {"beta": 0.3, "label_smoothing": 0.1, "simpo_gamma": 0.7}
ARGUMENTS: Mapping[str, Any] = {
    "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "max_length": None,
}  # fmt: skip


def pairs_of(base: Path, folder: Path) -> list[Example]:
    file = write_pairs(folder / "pairs.jsonl", ragged=True)
    config = make_config(folder, base, f"data.train={file}", "train.objective=dpo")
    data, _ = prepare_tokenizer_and_data(config, resolve_base(config.model), date=DATE)
    assert isinstance(data.train, Rows)
    pairs = list(data.train[:NUM_PAIRS])
    assert len({pair.loss_mask.sum() for pair in pairs}) > 1, "means over tokens and over pairs are to differ"
    return pairs


def indexed(pairs: Sequence[Example]) -> list[tuple[int, Example]]:
    return list(enumerate(pairs))


def with_prompts_of_one_token(pairs: Sequence[Example]) -> list[Example]:
    """Return the pairs of which TRL's ORPO trains the answers alone: nothing predicts the first token of a prompt."""

    def shortened(sequence: Example) -> Example:
        keep = np.r_[0, sequence.loss_mask.argmax() : len(sequence.input_ids)]
        return replace(sequence, input_ids=sequence.input_ids[keep], loss_mask=sequence.loss_mask[keep], rejected=None)

    return [replace(shortened(pair), rejected=shortened(pair.sequences[1])) for pair in pairs]


# --- TRL --------------------------------------------------------------------------------------------------------------


def _prompt_and_answers(pair: Example) -> list[list[int]]:
    """Return tokens of the prompt and of both answers, without what follows an answer."""
    labels = [sequence.loss_mask.nonzero()[0] for sequence in pair.sequences]
    answers = [sequence.input_ids[where].tolist() for sequence, where in zip(pair.sequences, labels, strict=True)]
    return [pair.input_ids[: labels[0][0]].tolist(), *answers]


class _TokenizedDpo(DPOTrainer):
    """Trains on rows that are tokens already."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *_arguments: Any) -> datasets.Dataset:
        return dataset


class _TokenizedCpo(CPOTrainer):
    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        return feature


class _TokenizedOrpo(ORPOTrainer):
    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        return feature


def _dpo_row(pair: Example) -> dict[str, list[int]]:
    return dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), _prompt_and_answers(pair), strict=True))


def _cpo_row(pair: Example) -> dict[str, list[int]]:
    prompt, *answers = _prompt_and_answers(pair)
    row = {}
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        row[f"{name}_input_ids"] = prompt + answer
        row[f"{name}_attention_mask"] = [1] * len(prompt + answer)
        row[f"{name}_labels"] = [-100] * len(prompt) + answer
    return row


class Oracle:
    """Loss, metrics and gradients of one of TRL's trainers."""

    def __init__(self, adapted: AdaptedModel, make: Callable[..., Any], **arguments: Any) -> None:
        initial = {name: each.detach().clone() for name, each in trainable_state(adapted.model).items()}
        self.trainer = make(adapted.model, processing_class=adapted.loaded.tokenizer, **arguments)
        for name, parameter in trainable_state(adapted.model).items():
            parameter.data = initial[name]  # TRL rounds to bfloat16 on a 4-bit base
        self._batch = self.trainer.data_collator(list(self.trainer.train_dataset))

    @classmethod
    def dpo(cls, adapted: AdaptedModel, reference: Any, pairs: Sequence[Example], folder: Path) -> "Oracle":
        """Return `DPOTrainer`, with a base of its own as the reference model."""
        rows = datasets.Dataset.from_list([_dpo_row(pair) for pair in pairs])
        arguments = DPOConfig(str(folder), router_aux_loss_coef=0.0, **ARGUMENTS)
        return cls(adapted, _TokenizedDpo, ref_model=reference, train_dataset=rows, args=arguments)

    @classmethod
    def cpo(cls, adapted: AdaptedModel, pairs: Sequence[Example], folder: Path) -> "Oracle":
        """Return `CPOTrainer`."""
        rows = datasets.Dataset.from_list([_cpo_row(pair) for pair in pairs])
        arguments = CPOConfig(str(folder), loss_type="simpo", **ARGUMENTS)
        return cls(adapted, _TokenizedCpo, train_dataset=rows, args=arguments)

    @classmethod
    def orpo(cls, adapted: AdaptedModel, pairs: Sequence[Example], folder: Path) -> "Oracle":
        """Return `ORPOTrainer`; pairs have prompts of one token."""
        assert all(each.loss_mask.argmax() == 1 for pair in pairs for each in pair.sequences)
        rows = datasets.Dataset.from_list([_cpo_row(pair) for pair in pairs])
        return cls(adapted, _TokenizedOrpo, train_dataset=rows, args=ORPOConfig(str(folder), **ARGUMENTS))

    def compute(self, **attributes: Any) -> Result:
        """Return loss, metrics and gradients of all pairs, with these attributes of the trainer."""
        trainer: Any = self.trainer
        for name, value in {**SETTINGS, **attributes}.items():
            setattr(trainer, name, value)
        stored = trainer._metrics["train"] if isinstance(trainer, DPOTrainer) else trainer._stored_metrics["train"]
        stored.clear()
        trainer.model.train().zero_grad()
        loss = trainer.compute_loss(trainer.model, self._batch)
        loss.backward()
        metrics = {name: values[-1] for name, values in stored.items()}
        return float(loss), metrics, _gradients(dict(trainer.model.named_parameters()))


# --- this package -----------------------------------------------------------------------------------------------------


def loss_of(name: str, reference: Any = base_model, **settings: float) -> PreferenceLoss:
    """Return an objective's loss with those of `SETTINGS` that it reads."""
    row = OBJECTIVES[name]
    settings = {key: SETTINGS.get(key, default) for key, default in row.defaults.items()} | settings
    return PreferenceLoss(name, reference=reference if row.uses_reference else None, **settings)


def compute(
    loss: PreferenceLoss, adapted: AdaptedModel, batch: dict[str, torch.Tensor], chunk_tokens: int | None = None
) -> Result:
    """Return our mean loss, metrics and gradients."""
    adapted.model.train().zero_grad()
    found = loss(adapted.model, batch, chunk_tokens=chunk_tokens, with_aux_loss=False)
    num_pairs, num_tokens = loss.num_items(batch), loss.num_sft_tokens(batch)
    mean = found.mean(num_pairs, num_tokens)
    mean.backward()
    metrics = {name: float(value) / num_pairs for name, value in found.metrics.items()}
    if found.sft_nll is not None:
        metrics[SFT_LOSS] = float(found.sft_nll) / num_tokens
    return float(mean), metrics, _gradients(trainable_state(adapted.model))


def _gradients(parameters: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}


def check_equal(actual: Result, expected: Result, without: Sequence[str] = ()) -> None:
    """Compare loss, the metrics that we have, and every gradient relative to the largest.

    Args:
        without: metrics that TRL's trainer does not have.
    """
    assert actual[0] == pytest.approx(expected[0], rel=TOLERANCE)
    metrics = {name: value for name, value in actual[1].items() if name not in without}
    expected_metrics = {name: expected[1][name] for name in metrics}
    assert metrics.keys() >= set(METRICS)
    assert metrics == pytest.approx(expected_metrics, rel=TOLERANCE, abs=TOLERANCE)
    assert actual[2].keys() == expected[2].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[2].values())
    assert largest > 1e-3
    for name, gradient in expected[2].items():
        assert float((actual[2][name] - gradient).abs().max()) <= TOLERANCE * largest, name
