"""Experts in 4 bits: bitsandbytes' numbers, Transformers' arithmetic, PEFT's adapters, one expert at a time."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_train.adapters import load_trained, trainable_state
from qlora_train.kernels import expert_linear, expert_weights
from qlora_train.kernels.block_sizes import padded_tokens
from qlora_train.kernels.expert_weights import ExpertLora, ExpertWeights, quantize_stack
from qlora_train.models import LoadedModel, load_model
from qlora_train.models.moe import expert_parameters, routers
from qlora_train.utils.errors import ConfigError
from tests.support.runs import adapted_model, adapter_bytes, losses, make_config, train_run

Pico = Callable[..., Path]
EXACT = "quantization.bnb_4bit_compute_dtype=float32"
KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "jetmoe", "llama4_text")
"""Plain; renamed; transposed with biases; without a gate; two outside Transformers' interface for experts."""
IDS = torch.arange(60).reshape(3, 20) * 5 % 300 + 4


def load(folder: Path, base: Path, *overrides: str) -> LoadedModel:
    config = make_config(folder, base, EXACT, *overrides)
    return load_model(config.model, config.quantization)


def plain_copy(loaded: LoadedModel, base: Path) -> nn.Module:
    """Return the base as Transformers has it, with the very weights that the 4-bit model stands for."""
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, module in loaded.model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                reference.get_submodule(name).weight.copy_(weight)
        for name, module in expert_parameters(loaded.model).items():
            reference.get_parameter(name).copy_(getattr(module, name.rpartition(".")[2]))
    return reference.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("double_quant", [True, False])
def test_each_expert_equals_a_linear4bit_layer(double_quant: bool) -> None:
    stack = torch.randn(3, 96, 128, generator=torch.Generator().manual_seed(0))
    quantized = quantize_stack(stack, quant_type="nf4", double_quant=double_quant)
    weights = ExpertWeights(quantized.states)
    assert weights(quantized.codes).shape == stack.shape
    for index, matrix in enumerate(stack):
        layer = bnb.nn.Linear4bit(128, 96, bias=False, compress_statistics=double_quant, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            matrix, requires_grad=False, compress_statistics=double_quant, quant_type="nf4", module=layer
        ).to("cpu")
        wanted = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(weights.matrix(quantized.codes, index), wanted)
        assert torch.equal(weights(quantized.codes)[index], wanted)


@pytest.mark.parametrize("model_type", KINDS)
def test_4_bit_base_matches_transformers_on_dequantized_weights(model_type: str, pico: Pico, tmp_path: Path) -> None:
    loaded = load(tmp_path, pico(model_type))
    stacks = expert_parameters(loaded.model)
    assert stacks
    held = [expert_weights.quantized_experts(module, name.rpartition(".")[2]) for name, module in stacks.items()]
    assert all(held), "every stack is in 4 bits"
    for found in held:
        assert found is not None
        assert found[0].numel() * 2 == found[1].shape.numel(), "half a byte a weight"
    torch.testing.assert_close(logits(loaded.model), logits(plain_copy(loaded, pico(model_type))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", KINDS)
def test_expert_adapter_matches_peft(model_type: str, pico: Pico, tmp_path: Path) -> None:
    """The saved adapter, loaded by PEFT alone onto plain 16-bit modules, computes the same model."""
    found = adapted_model(tmp_path, pico(model_type))
    reference = plain_copy(load(tmp_path, pico(model_type)), pico(model_type))
    found.model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    ours = found.model.eval()
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-4, atol=1e-4)
    with ours.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-4, atol=1e-4)
    assert any(".experts" in name or "output_linear" in name for name in trainable_state(ours))


@pytest.mark.parametrize(
    ("model_type", "recompute"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in KINDS[:4])]
)
def test_gradients_match_peft(model_type: str, recompute: bool, pico: Pico, tmp_path: Path) -> None:
    found = adapted_model(tmp_path, pico(model_type))
    reference = plain_copy(load(tmp_path, pico(model_type)), pico(model_type))
    found.model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(reference, tmp_path / "adapter", is_trainable=True)
    gradients = []
    for model in (found.model, stock):
        model.train()
        if recompute and model is found.model:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[1].items():
        assert wanted is not None
        torch.testing.assert_close(gradients[0][name], wanted, rtol=1e-3, atol=1e-5 + 1e-3 * float(wanted.abs().max()))


def test_experts_are_dequantized_one_at_a_time(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = adapted_model(tmp_path, pico("qwen3_moe"))
    whole: list[torch.Size] = []
    monkeypatch.setattr(ExpertWeights, "forward", lambda self, codes: whole.append(self.shape))
    found.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert not whole, "the whole stack was asked for"


def test_dropped_tokens_contribute_nothing() -> None:
    """Ids beyond the last expert are how a router says that a token is dropped."""

    class Stack(nn.Module):
        has_gate, has_bias, is_transposed, num_experts = False, False, False, 2

        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(2, 4, 3))
            self.act_fn = nn.Identity()

    x = torch.ones(2, 4)
    found = expert_linear.experts_forward(Stack(), x, torch.tensor([[0, 2], [2, 2]]), torch.full((2, 2), 0.5))
    assert torch.equal(found, torch.tensor([[6.0] * 4, [0.0] * 4]))


class GatedStack(nn.Module):
    """Two experts with biases, in bfloat16."""

    has_gate, has_bias, is_transposed, num_experts = True, True, False, 2

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"gate_up_proj": (2, 64, 32), "down_proj": (2, 32, 32)}
        for name, shape in {**shapes, **{f"{name}_bias": shape[:2] for name, shape in shapes.items()}}.items():
            values = torch.randn(shape, generator=generator) / 6
            self.register_parameter(name, nn.Parameter(values.to(torch.bfloat16)))

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def test_tokens_that_pad_an_expert_on_a_cpu_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, generator = GatedStack(), torch.Generator().manual_seed(1)
    x = torch.randn(45, 32, generator=generator).to(torch.bfloat16)
    chosen = torch.randint(2, (45, 1), generator=generator)
    lora = {
        "gate_up_proj": ExpertLora(torch.randn(2, 4, 32).requires_grad_(), torch.randn(2, 64, 4).requires_grad_(), 0.1)
    }
    found = []
    for pads in (True, False):
        if not pads:
            monkeypatch.setattr(expert_linear, "pad_tokens", lambda tokens: tokens)
        inputs = x.clone().requires_grad_()
        output = expert_linear.experts_forward(experts, inputs, chosen, torch.ones(45, 1), lora)
        trained = (inputs, lora["gate_up_proj"].a, lora["gate_up_proj"].b)
        found.append((output, *torch.autograd.grad(output.float().square().sum(), trained)))
    for padded, expected in zip(*found, strict=True):
        torch.testing.assert_close(padded, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_experts_on_a_cpu_have_few_numbers_of_tokens() -> None:
    counts = range(1, 4097)
    padded = [padded_tokens(count) for count in counts]
    assert all(0 <= more - count < max(32, count / 4) for count, more in zip(counts, padded, strict=True))
    assert len(set(padded)) == 24, "oneDNN keeps a kernel for each"


def test_routers_stay_in_16_bits_without_adapter(pico: Pico, tmp_path: Path) -> None:
    names = routers(load(tmp_path, pico("qwen2_moe")).model)
    assert sorted({name.rpartition(".")[2] for name in names}) == ["shared_expert_gate"]
    assert all(type(layer) is nn.Linear for layer in names.values())
    assert not [
        name for name in trainable_state(adapted_model(tmp_path, pico("qwen2_moe")).model) if "expert_gate" in name
    ]


def test_layers_whose_names_peft_maps_to_experts_are_logged(
    pico: Pico, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        adapted_model(tmp_path, pico("dots1"))
    lines = [record.getMessage() for record in caplog.records if "adapter: none on" in record.getMessage()]
    assert [line.partition(" (")[0] for line in lines] == [
        f"adapter: none on 2 layers called {name}" for name in ("down_proj", "gate_proj", "up_proj")
    ]
    with pytest.raises(ConfigError, match="target_modules: gate_proj cannot carry an adapter: PEFT maps this name"):
        adapted_model(tmp_path, pico("dots1"), "lora.target_modules=[q_proj,gate_proj]")


def test_experts_are_targeted_by_name_or_not_at_all(pico: Pico, tmp_path: Path) -> None:
    def adapted_stacks(*overrides: str) -> set[str]:
        config = adapted_model(tmp_path, pico("mixtral"), *overrides).model.peft_config["default"]
        return {name.rpartition(".")[2] for name in config.target_parameters or ()}

    assert adapted_stacks() == {"gate_up_proj", "down_proj"}
    assert adapted_stacks("lora.target_parameters=[experts.down_proj]") == {"down_proj"}
    assert adapted_stacks("lora.target_parameters=[]") == set()
    assert adapted_stacks("lora.target_modules=[q_proj]") == set()
    with pytest.raises(ConfigError, match=r"no expert parameter is called w1; this model has down_proj, gate_up_proj"):
        adapted_stacks("lora.target_parameters=[w1]")


@pytest.mark.parametrize("setting", ["lora.lora_dropout=0.1", "lora.use_dora=true", "lora.init_lora_weights=eva"])
def test_settings_that_peft_lacks_for_experts_are_refused(setting: str, pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]}: .* is not supported for experts"):
        adapted_model(tmp_path, pico("mixtral"), setting)
    adapted_model(tmp_path, pico("mixtral"), setting, "lora.target_parameters=[]")


def test_mixture_of_experts_warm_starts_from_its_adapter(pico: Pico, tmp_path: Path) -> None:
    settings = (EXACT, "train.max_steps=2")
    first = train_run(tmp_path, pico("qwen3_moe"), *settings, name="first")
    start = f"lora.adapter_path={first.adapter}"
    second = train_run(tmp_path, pico("qwen3_moe"), *settings, start, name="second")
    assert losses(second)[0] < losses(first)[0]
    assert adapter_bytes(second) != adapter_bytes(first)
    with pytest.raises(ConfigError, match=r"target_parameters: the adapter in .* has \[down_proj, gate_up_proj\]"):
        train_run(tmp_path, pico("qwen3_moe"), *settings, start, "lora.target_parameters=[]", name="third")


def test_adapter_of_another_mixture_is_refused(pico: Pico, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico("qwen3_moe"), EXACT, "train.max_steps=2")
    other = load(tmp_path, pico("qwen3_moe", num_hidden_layers=1), "lora.r=8")
    (run.adapter / "adapter_config.json").write_text(
        (run.adapter / "adapter_config.json").read_text().replace(pico("qwen3_moe").name, other.source.name)
    )
    with pytest.raises(ConfigError, match=r"target_parameters: 'model.layers.1.mlp.experts.*is no expert parameter"):
        load_trained(other, run.adapter)


def test_architecture_without_checkpointing_trains_without_it(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing: full, but Transformers does not support"):
        train_run(tmp_path, pico("jetmoe"), EXACT, "train.gradient_checkpointing=full")
