"""Keys and values are repeated only if no fused kernel supports grouped queries, without changing results."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.backends import cuda
from torch.nn import functional
from transformers import AutoModelForCausalLM

from qlora_train.kernels import grouped_sdpa

SHARED_KEYS = SimpleNamespace(num_key_value_groups=4, is_causal=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """Record the key heads and the keyword arguments of every call of sdpa."""
    actual: list[tuple[int, dict[str, Any]]] = []
    own = functional.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
        actual.append((key.shape[1], keywords))
        return torch.empty(query.shape) if query.is_cuda else own(query, key, value, **keywords)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    return actual


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Answer as torch 2.13's sdp_utils.cpp on such a GPU."""

    def fused_supports_groups(params: Any, debug: bool = False) -> bool:
        del debug
        return (
            capability >= (8, 0) and params.query.dtype in (torch.float16, torch.bfloat16) and params.attn_mask is None
        )

    monkeypatch.setattr(cuda, "can_use_flash_attention", fused_supports_groups)
    for name in ("can_use_cudnn_attention", "can_use_efficient_attention"):
        monkeypatch.setattr(cuda, name, lambda *_: False)


@pytest.mark.parametrize(
    ("capability", "dtype", "repeated"),
    [
        ((7, 5), torch.float16, True),
        ((8, 0), torch.float16, False),
        ((8, 6), torch.bfloat16, False),
        ((12, 0), torch.bfloat16, False),
        ((9, 0), torch.float32, True),
    ],
)
def test_keys_are_repeated_if_only_the_math_kernel_supports_groups(
    capability: tuple[int, int], dtype: torch.dtype, repeated: bool, monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    pretend_gpu(monkeypatch, capability)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, heads, 32, 64, dtype=dtype, device="cuda") for heads in (8, 2, 2))
        output, _ = grouped_sdpa.attend(SHARED_KEYS, q, k, v, None, scaling=0.125)
        assert output.shape == (1, 32, 8, 64)
    [(key_heads, keywords)] = calls
    assert (key_heads, keywords.get("enable_gqa", False)) == ((8, False) if repeated else (2, True))
    assert (keywords["is_causal"], keywords["attn_mask"]) == (True, None)


def test_kernels_are_chosen_for_the_dtype_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)  # torch.autocast needs a GPU
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, heads, 32, 64, device="cuda") for heads in (8, 2, 2))
        assert not grouped_sdpa.needs_repeated_keys(q, k, v, {})


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_repeated_keys_change_neither_logits_nor_gradients(
    model_type: str, pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    grouped_sdpa.register()
    model = AutoModelForCausalLM.from_pretrained(pico(model_type), dtype=torch.float64, attn_implementation="sdpa")
    tokens, results = torch.arange(3, 27)[None], []
    for repeated in (False, True):
        monkeypatch.setattr(grouped_sdpa, "needs_repeated_keys", lambda *_, actual=repeated: actual)
        model.zero_grad()
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append((output.logits.detach(), gradients))
        assert {keywords.get("enable_gqa", False) for _, keywords in calls} == {not repeated}
        calls.clear()
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_grouped_attention_stores_scores_on_a_gpu(dtype: torch.dtype) -> None:
    heads, length = 8, 4096
    q, k, v = (
        torch.randn(1, each, length, 64, dtype=dtype, device="cuda", requires_grad=True) for each in (heads, 2, 2)
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, _ = grouped_sdpa.attend(SHARED_KEYS, q, k, v, None, scaling=0.125)
    output.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < heads * length**2 * dtype.itemsize / 2
