"""The chunked loss and its gradients match the loss of all labels on every family, without saved logits."""

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from qlora_train.adapters import choose_targets, find_linears
from qlora_train.architectures import ARCHITECTURES
from qlora_train.config import LoraSection
from qlora_train.kernels.ops.cross_entropy import CHUNK_BYTES
from qlora_train.objectives.label_losses import label_losses, supports_chunking
from qlora_train.training.memory.activation_checkpointing import ignoring_weights
from qlora_train.utils.constants import IGNORE_INDEX
from tests.support.pico import FAMILIES, build_config

SCALED_HEADS = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
}
"""Families that scale or cap their logits, strongly enough to detect its absence."""
NOT_CHUNKED = "opt"
"""Its outermost module calls the decoder inside the next one."""


def adapted(family: str, **peft: Any) -> Any:
    torch.manual_seed(0)
    config = build_config(family, **SCALED_HEADS.get(family, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    targets = choose_targets(model, find_linears(model), LoraSection(), ARCHITECTURES[family])
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **peft)
    return get_peft_model(model, lora).eval()  # some have a dropout


def batch() -> dict[str, torch.Tensor]:
    """Return three ragged rows with a number of labels that no chunk size divides."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(4, 300, (3, 20), generator=generator)
    labels, attention_mask = input_ids.clone(), torch.ones_like(input_ids)
    labels[0, :7] = IGNORE_INDEX
    labels[1, 15:], attention_mask[1, 15:] = IGNORE_INDEX, 0
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def losses_and_gradients(model: Any, chunk_tokens: int | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = label_losses(model, chunk_tokens, **batch()).nll
    (losses.sum() / 7).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return losses.detach(), {name: parameter.grad.clone() for name, parameter in trained.items()}


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {NOT_CHUNKED}))
@pytest.mark.parametrize("chunk_tokens", [5, 1000])
def test_loss_and_gradients_match_those_of_all_labels(family: str, chunk_tokens: int) -> None:
    model = adapted(family)
    expected, wanted_gradients = losses_and_gradients(model, None)
    actual, gradients = losses_and_gradients(model, chunk_tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    assert supports_chunking(model)


@pytest.mark.parametrize("family", SCALED_HEADS)
def test_logits_of_these_families_are_scaled_or_capped(family: str) -> None:
    model = adapted(family)
    hidden = model.get_base_model().base_model(input_ids=batch()["input_ids"]).last_hidden_state
    plain = model.get_output_embeddings()(hidden)
    logits = model(input_ids=batch()["input_ids"]).logits
    assert float((plain - logits).abs().max()) > 0.5


def test_trained_head_has_its_gradient() -> None:
    model = adapted("llama", modules_to_save=["lm_head"])
    _, expected = losses_and_gradients(model, None)
    _, actual = losses_and_gradients(model, 5)
    (name,) = [name for name in expected if "lm_head" in name]
    torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_overwrite_the_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the matmul of the head and soft-capping allocate a tensor of their size."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 1)  # one row per chunk
    model = adapted(family)
    num_labels = int((batch()["labels"][:, 1:] != IGNORE_INDEX).sum())
    large: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            result = function(*arguments, **(keywords or {}))
            is_new = isinstance(result, torch.Tensor) and not any(
                isinstance(each, torch.Tensor) and each.data_ptr() == result.data_ptr() for each in arguments
            )
            if is_new and result.numel() >= num_labels * model.config.vocab_size:
                large.append(str(function).removeprefix("aten."))
            return result

    with Watch():
        label_losses(model, num_labels, **batch())
    capping = ["div.Tensor", "tanh.default", "mul.Tensor"]
    backward = ["mul.Tensor", "tanh_backward.default", "div.Tensor"]
    assert large == ["mm.default", *(capping + backward if family == "gemma2" else [])]


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_one_chunk_of_logits_exists_at_a_time(head: str) -> None:
    """Autograd saves at most one chunk of logits, and none after the forward pass."""
    model = adapted("llama", **({"modules_to_save": ["lm_head"]} if head == "trained" else {}))
    vocabulary, hidden = model.config.vocab_size, model.config.hidden_size

    def rows_of_logits(chunk_tokens: int | None) -> tuple[int, int]:
        """Return the most rows at once, and how many tensors with such rows are left."""
        kept: list[weakref.ref[torch.Tensor]] = []
        rows = [0]

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if vocabulary in tensor.shape and hidden not in tensor.shape:
                kept.append(weakref.ref(tensor))
                rows.append(tensor.numel() // vocabulary)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _losses = label_losses(model, chunk_tokens, **batch())
        gc.collect()
        return max(rows), sum(tensor() is not None for tensor in kept)

    most, left = rows_of_logits(None)
    assert most > 20
    assert left > 0
    most, left = rows_of_logits(5)
    assert most <= 5
    assert left == 0


def test_model_is_unchanged() -> None:
    model = adapted("llama")
    before = {name: id(module) for name, module in model.named_modules()}
    losses_and_gradients(model, 5)
    assert {name: id(module) for name, module in model.named_modules()} == before
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_decoder_inside_another_module_does_not_support_chunking() -> None:
    assert not supports_chunking(adapted(NOT_CHUNKED))


class _LogitsFromInputIds(nn.Module):
    """A causal language model whose logits depend on more than hidden states."""

    base_model_prefix = "model"

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.model, self.lm_head, self.config = inner.model, inner.lm_head, inner.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor | None = None, **keywords: Any) -> Any:
        output = self.model(input_ids=input_ids, **keywords)
        output.logits = self.lm_head(output.last_hidden_state) * (2.0 if input_ids is not None else 1.0)
        return output


def test_logits_from_more_than_hidden_states_do_not_support_chunking() -> None:
    assert not supports_chunking(_LogitsFromInputIds(adapted("llama").get_base_model()))


def test_head_that_saves_its_logits_does_not_support_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients overwrite the logits, and the gradient of tanh needs its output."""
    model = adapted("llama")
    head = model.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda hidden: nn.functional.linear(hidden, head.weight).tanh())
    with torch.no_grad():
        whole, chunks = (label_losses(model, chunk_tokens, **batch()).nll for chunk_tokens in (None, 5))
    torch.testing.assert_close(chunks, whole)
    assert not supports_chunking(model)


def test_model_that_rounds_differently_with_gradients_supports_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    """As models with fused kernels do: both losses are probed with gradients."""
    model = adapted("llama")
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    own = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: own(x) * (2 if torch.is_grad_enabled() else 1))
    assert supports_chunking(model)


def test_activations_are_moved_to_the_host_and_weights_are_not() -> None:
    moved: list[torch.Tensor] = []
    hooks = saved_tensors_hooks(lambda tensor: (moved.append(tensor), (tensor,))[1], lambda kept: kept[0])
    layer, x = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    with ignoring_weights(layer, hooks):
        layer(x).sum().backward()  # x is saved for the gradient of the weight, the weight for that of x
    assert [tensor.data_ptr() for tensor in moved] == [x.data_ptr()]
    assert torch.equal(x.grad, layer.weight.detach().sum(0).expand(2, 4))
