"""Stored log-probabilities of the reference model give the loss, metrics and gradients of those computed on the fly."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.adapters.reference_model import base_model
from qlora_train.data.collate import FlatteningCollator, PaddingCollator, collate_rows
from qlora_train.data.types import Example
from qlora_train.kernels.packed import attention
from qlora_train.kernels.packed.row_positions import PACKED_ATTENTION
from qlora_train.objectives.reference_logps import reference_logps
from tests.support.label_logps import log_probability
from tests.support.preference_oracles import compute, indexed, loss_of, pairs_of
from tests.support.runs import adapted_model

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pairs(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return pairs_of(pico_llama, tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def adapted(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    """A model whose adapter is trained: every matrix differs from its start."""
    adapted = adapted_model(tmp_path_factory.mktemp("adapted"), pico_llama)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_state(adapted.model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    attention.register()
    adapted.loaded.model.set_attn_implementation(PACKED_ATTENTION)
    return adapted


def base_logp(adapted: AdaptedModel, sequence: Example) -> float:
    with adapted.model.disable_adapter():
        return log_probability(adapted.model.eval(), sequence)


def stored(adapted: AdaptedModel, pairs: Sequence[Example]) -> list[Example]:
    """Return pairs with the base's log-probabilities, each sequence computed by itself."""
    found = []
    for pair in pairs:
        assert pair.rejected is not None
        rejected = replace(pair.rejected, reference_logp=base_logp(adapted, pair.rejected))
        found.append(replace(pair, reference_logp=base_logp(adapted, pair), rejected=rejected))
    return found


@pytest.mark.parametrize("collate", [PaddingCollator(0), FlatteningCollator(share_prefixes=True)])
def test_stored_values_give_the_loss_metrics_and_gradients_of_a_reference_pass(
    collate: Any, adapted: AdaptedModel, pairs: list[Example]
) -> None:
    batches = [collate_rows(collate, indexed(rows)) for rows in (pairs, stored(adapted, pairs))]
    for name in ("dpo", "ipo", "apo_zero"):
        on_the_fly, from_batch = (compute(loss_of(name), adapted, batch, 7) for batch in batches)
        assert from_batch[0] == pytest.approx(on_the_fly[0], rel=TOLERANCE)
        assert from_batch[1] == pytest.approx(on_the_fly[1], rel=TOLERANCE, abs=1e-5)
        assert abs(from_batch[1]["rewards/margins"]) > 0.01
        largest = max(float(gradient.abs().max()) for gradient in on_the_fly[2].values())
        for parameter, gradient in on_the_fly[2].items():
            assert float((from_batch[2][parameter] - gradient).abs().max()) <= TOLERANCE * largest, parameter


def test_a_batch_with_stored_values_costs_one_forward_pass(adapted: AdaptedModel, pairs: list[Example]) -> None:
    calls: list[bool] = []
    handle = adapted.model.get_base_model().register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for rows, expected in ((pairs, [False, True]), (stored(adapted, pairs), [True])):
        calls.clear()
        compute(loss_of("dpo"), adapted, collate_rows(PaddingCollator(0), indexed(rows)))
        assert calls == expected
    handle.remove()


def test_values_follow_their_sequences_through_any_order(adapted: AdaptedModel, pairs: list[Example]) -> None:
    rows = stored(adapted, pairs)
    expected = {(row, number): each.reference_logp for row, pair in indexed(rows) for number, each in
                enumerate(pair.sequences)}  # fmt: skip
    for collate in (PaddingCollator(0), FlatteningCollator(share_prefixes=True)):
        batch = collate_rows(collate, indexed(rows)[::-1])
        keys = zip(batch["row"].tolist(), batch["sequence"].tolist(), strict=True)
        assert batch["reference_logps"].dtype == torch.float32
        assert batch["reference_logps"].tolist() == pytest.approx([expected[key] for key in keys], rel=1e-6)
        on_the_fly = {name: tensor for name, tensor in batch.items() if name != "reference_logps"}
        computed = reference_logps(adapted.model, on_the_fly, base_model)
        assert computed.tolist() == pytest.approx(batch["reference_logps"].tolist(), rel=TOLERANCE)


def test_rows_with_and_without_values_never_share_a_batch(adapted: AdaptedModel, pairs: list[Example]) -> None:
    mixed = [*stored(adapted, pairs[:1]), *pairs[1:]]
    with pytest.raises(AssertionError, match="with and without"):
        collate_rows(PaddingCollator(0), indexed(mixed))
