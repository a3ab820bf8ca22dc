"""Preference losses, metrics and gradients are those of TRL's trainers on the same pairs, in float32."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_train.adapters import trainable_state
from qlora_train.adapters.reference_model import InitialAdapter
from qlora_train.config.objectives import OBJECTIVES
from qlora_train.data.collate import FlatteningCollator, PaddingCollator, collate_rows
from qlora_train.evaluation.objective_table import make_objective
from qlora_train.kernels.packed import attention
from qlora_train.kernels.packed.row_positions import PACKED_ATTENTION
from qlora_train.objectives.batch_loss import SFT_LOSS
from qlora_train.objectives.pair_losses import PAIR_LOSSES, Pairs, PairSettings
from qlora_train.objectives.sft_loss import SftLoss
from tests.support.preference_oracles import (
    NUM_PAIRS,
    Oracle,
    check_equal,
    compute,
    indexed,
    loss_of,
    pairs_of,
    with_prompts_of_one_token,
)
from tests.support.runs import adapted_model, make_config

Pico = Callable[..., Path]
FAMILIES = ("llama", "gemma2", "qwen3", "gpt_neox", "phi3", "qwen3_moe")
WITH_REFERENCE = [name for name in PAIR_LOSSES if OBJECTIVES[name].uses_reference]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_metrics_and_gradients_are_those_of_trl(family: str, pico: Pico, tmp_path: Path) -> None:
    base = pico(family)
    pairs = pairs_of(base, tmp_path)
    adapted, theirs, reference = (adapted_model(tmp_path, base) for _ in range(3))
    expected = Oracle.dpo(theirs, reference.model.unload(), pairs, tmp_path / "trl")
    batch = collate_rows(PaddingCollator(0), indexed(pairs))
    for name in WITH_REFERENCE if family == "llama" else ("dpo",):
        trl_name = "sigmoid" if name == "dpo" else name
        check_equal(compute(loss_of(name), adapted, batch), expected.compute(loss_types=[trl_name]))
    for name, trl_name in (("dpo", "sigmoid"), ("ipo", "ipo")):
        found = compute(loss_of(name, sft_weight=0.7), adapted, batch)
        weighted = expected.compute(loss_types=[trl_name, "sft"], loss_weights=[1.0, 0.7])
        check_equal(found, weighted, without=[SFT_LOSS])
        plain = compute(loss_of(name), adapted, batch)
        assert found[0] == pytest.approx(plain[0] + 0.7 * found[1][SFT_LOSS])


@pytest.mark.parametrize("family", FAMILIES)
def test_orpo_is_that_of_trl(family: str, pico: Pico, tmp_path: Path) -> None:
    base = pico(family)
    pairs = with_prompts_of_one_token(pairs_of(base, tmp_path))
    adapted, theirs = adapted_model(tmp_path, base), adapted_model(tmp_path, base)
    expected = Oracle.orpo(theirs, pairs, tmp_path / "orpo")
    batch = collate_rows(PaddingCollator(0), indexed(pairs))
    found = compute(loss_of("orpo"), adapted, batch)
    check_equal(found, expected.compute())
    assert {SFT_LOSS, "log_odds_ratio", "log_odds_chosen"} <= found[1].keys()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_simpo_and_cpo_are_those_of_trl(family: str, pico: Pico, tmp_path: Path) -> None:
    base = pico(family)
    pairs = pairs_of(base, tmp_path)
    adapted, theirs = adapted_model(tmp_path, base), adapted_model(tmp_path, base)
    expected = Oracle.cpo(theirs, pairs, tmp_path / "trl")
    batch = collate_rows(PaddingCollator(0), indexed(pairs))
    for name, loss_type in (("simpo", "simpo"), ("cpo", "sigmoid")):
        for weight in (0.0, 0.7):
            found = compute(loss_of(name, sft_weight=weight), adapted, batch)
            check_equal(found, expected.compute(loss_type=loss_type, cpo_alpha=weight))
            assert (SFT_LOSS in found[1]) == (weight > 0)


def test_orpo_trains_no_prompt(pico_llama: Path, tmp_path: Path) -> None:
    pairs = pairs_of(pico_llama, tmp_path)
    adapted = adapted_model(tmp_path, pico_llama)
    batch = collate_rows(PaddingCollator(0), indexed(pairs))
    found = loss_of("orpo")(adapted.model, batch, chunk_tokens=None, with_aux_loss=False)
    chosen = collate_rows(PaddingCollator(0), [(row, replace(pair, rejected=None)) for row, pair in indexed(pairs)])
    expected = SftLoss()(adapted.model, chosen, chunk_tokens=None, with_aux_loss=False)
    assert found.sft_nll is not None
    assert float(found.sft_nll) == pytest.approx(float(expected.total), rel=1e-6)
    assert loss_of("orpo").num_sft_tokens(batch) == SftLoss().num_items(chosen)


def test_certain_answers_have_finite_odds() -> None:
    logps = torch.tensor([[0.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [-200.0, -300.0]], requires_grad=True)
    pairs = Pairs(logps, torch.zeros_like(logps), torch.ones_like(logps))
    loss = PAIR_LOSSES["orpo"](pairs, PairSettings(beta=0.1))
    loss.sum().backward()
    assert logps.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logps.grad).all()


def test_prompts_computed_once_give_the_same_loss_and_gradients(pico_llama: Path, tmp_path: Path) -> None:
    pairs = pairs_of(pico_llama, tmp_path)
    adapted = adapted_model(tmp_path, pico_llama)
    losses = [loss_of("dpo", sft_weight=0.7), loss_of("simpo"), loss_of("orpo")]
    apart = [compute(loss, adapted, collate_rows(PaddingCollator(0), indexed(pairs))) for loss in losses]
    attention.register()
    adapted.loaded.model.set_attn_implementation(PACKED_ATTENTION)
    batch = collate_rows(FlatteningCollator(share_prefixes=True), indexed(pairs))
    assert (
        batch["input_ids"].numel()
        < sum(pair.num_tokens for pair in pairs) - sum(pair.loss_mask.argmax() for pair in pairs) / 2
    )
    for loss, expected in zip(losses, apart, strict=True):
        for chunk_tokens in (None, 7):
            check_equal(compute(loss, adapted, batch, chunk_tokens), expected)


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


def test_without_a_reference_there_is_no_reference_pass(pico_llama: Path, tmp_path: Path) -> None:
    pairs = pairs_of(pico_llama, tmp_path)
    adapted = adapted_model(tmp_path, pico_llama)
    batch = collate_rows(PaddingCollator(0), indexed(pairs))
    forwards: list[str] = []
    adapted.model.get_output_embeddings().register_forward_hook(lambda *_arguments: forwards.append("forward"))
    for name, num_forwards in (("dpo", 2), ("simpo", 1)):
        config = make_config(tmp_path, pico_llama, f"train.objective={name}", f"lora.adapter_path={tmp_path}")
        objective = make_objective(config.train, config.lora, adapted.model)
        for measure in (
            lambda loss=objective.loss: loss(adapted.model, batch, chunk_tokens=None, with_aux_loss=False),
            lambda evaluate=objective.evaluate: evaluate(adapted.model, pairs, batch_size=NUM_PAIRS, pad_token_id=0),
        ):
            forwards.clear()
            measure()
            assert len(forwards) == num_forwards, name
