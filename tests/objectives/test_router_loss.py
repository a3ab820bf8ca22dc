"""The load-balancing loss: Switch Transformers' formula, its weight in a step, and which models have it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_train.objectives.label_losses import has_aux_loss, label_losses
from qlora_train.runs import RunFolder
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.errors import ConfigError
from tests.support.pico import build_config
from tests.support.runs import adapter_bytes, stopped_copy, train_run

Pico = Callable[..., Path]
EXACT = ("quantization.bnb_4bit_compute_dtype=float32", "train.max_steps=4", "train.save_steps=2")
WEIGHTED = (*EXACT, "train.router_aux_loss_coef=0.5")


def metrics(run: RunFolder, name: str) -> list[float]:
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def switch_loss(router_logits: tuple[torch.Tensor, ...], real: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return experts x sum over experts of (share of the choices that fall on it) x (its mean probability)."""
    probabilities = torch.cat(
        [logits.reshape(real.numel(), -1)[real.flatten()].softmax(-1) for logits in router_logits]
    )
    num_experts = probabilities.shape[1]
    chosen = probabilities.topk(top_k, dim=-1).indices
    shares = torch.stack([(chosen == expert).float().mean(0) for expert in range(num_experts)])  # (experts, top_k)
    return num_experts * (shares * probabilities.mean(0)[:, None]).sum()


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_loss_is_the_published_formula_over_real_tokens(model_type: str, chunk_tokens: int | None) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_config(model_type)).eval()
    ids = torch.randint(4, 300, (3, 20), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 12:], labels[1, 12:] = 0, IGNORE_INDEX
    actual = label_losses(model, chunk_tokens, input_ids=ids, labels=labels, attention_mask=mask, with_aux_loss=True)
    plain = label_losses(model, chunk_tokens, input_ids=ids, labels=labels, attention_mask=mask)
    output = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    expected = switch_loss(output.router_logits, mask.bool(), model.config.num_experts_per_tok)
    assert actual.aux_loss is not None
    torch.testing.assert_close(actual.aux_loss, expected, rtol=1e-5, atol=1e-5)
    assert actual.aux_loss > 1.9  # two choices a token: 2 is perfect balance
    assert torch.equal(actual.nll, plain.nll)
    assert plain.aux_loss is None


def test_step_adds_the_weighted_loss_for_any_micro_batches(pico: Pico, tmp_path: Path) -> None:
    one_step = (EXACT[0], "train.max_steps=1", "train.learning_rate=1e-9", "data.eval=0.5")
    base = pico("qwen3_moe")
    plain = train_run(tmp_path, base, *one_step, name="plain")
    weighted = train_run(tmp_path, base, *one_step, "train.router_aux_loss_coef=0.5", name="weighted")
    [aux_loss] = metrics(weighted, "router_aux_loss")
    assert metrics(plain, "router_aux_loss") == []
    difference = metrics(weighted, "loss")[0] - metrics(plain, "loss")[0]
    assert difference == pytest.approx(0.5 * aux_loss, rel=0.05)  # micro-batches differ in labels
    assert metrics(weighted, "eval_loss") == pytest.approx(metrics(plain, "eval_loss"), abs=1e-4)


def test_loss_trains_towards_balance_with_and_without_checkpointing(pico: Pico, tmp_path: Path) -> None:
    base, heavy = (
        pico("mixtral"),
        (EXACT[0], "train.router_aux_loss_coef=1", "train.max_steps=12", "train.logging_steps=1"),
    )
    stored = train_run(tmp_path, base, *heavy, name="stored")
    recomputed = train_run(tmp_path, base, *heavy, "train.gradient_checkpointing=full", name="recomputed")
    ignored = train_run(tmp_path, base, EXACT[0], "train.router_aux_loss_coef=1e-9", *heavy[2:], name="ignored")
    assert metrics(recomputed, "router_aux_loss") == pytest.approx(metrics(stored, "router_aux_loss"), rel=1e-4)
    assert metrics(stored, "router_aux_loss")[-1] < metrics(ignored, "router_aux_loss")[-1] - 0.01


def test_config_json_enables_and_zero_disables(pico: Pico, tmp_path: Path, caplog: Any) -> None:
    base = pico("mixtral", output_router_logits=True, router_aux_loss_coef=0.25)
    own = train_run(tmp_path, base, *EXACT, name="own")
    explicit = train_run(tmp_path, base, *EXACT, "train.router_aux_loss_coef=0.25", name="explicit")
    off = train_run(tmp_path, base, *EXACT, "train.router_aux_loss_coef=0", name="off")
    assert adapter_bytes(own) == adapter_bytes(explicit) != adapter_bytes(off)
    assert metrics(off, "router_aux_loss") == []


def test_resumed_run_is_bitwise_equal_with_equal_logs(pico: Pico, tmp_path: Path) -> None:
    settings = (*WEIGHTED, "train.logging_steps=4")
    straight = train_run(tmp_path, pico("mixtral"), *settings, name="straight")
    stopped_copy(straight, tmp_path / "stopped")
    resumed = train_run(tmp_path, pico("mixtral"), *settings, name="stopped")
    assert adapter_bytes(resumed) == adapter_bytes(straight)
    assert metrics(resumed, "router_aux_loss")[-1] == metrics(straight, "router_aux_loss")[-1]


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_model_without_the_loss_is_refused(model_type: str, pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no load-balancing loss for a {model_type} model"):
        train_run(tmp_path, pico(model_type), *WEIGHTED)


def test_most_mixtures_have_the_loss() -> None:
    torch.manual_seed(0)
    names = ("olmoe", "qwen3_moe", "granitemoe", "phimoe", "jetmoe", "glm4_moe")
    actual = {name: has_aux_loss(AutoModelForCausalLM.from_config(build_config(name))) for name in names}
    assert actual == {**dict.fromkeys(names, True), "glm4_moe": False}
