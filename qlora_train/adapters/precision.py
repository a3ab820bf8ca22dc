"""Everything that trains is float32: bfloat16 would round away small updates, and a resumed run would not be the same."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from torch.nn import functional


def train_in_float32(model: PeftModel, compute_dtype: torch.dtype) -> None:
    """Make all that trains float32, and let trained modules of the base compute with it.

    LoRA and new token rows cast by themselves. A head, norm or embedding that is trained does not: it becomes float32 as a
    whole, takes float32 and hands on the compute dtype. A linear layer of which only the bias is trained keeps its weight
    as it is (it may be shared, or in 4 bits) and adds the bias in the compute dtype; bitsandbytes alone would round that
    bias, for good, in its first forward.
    """
    for name, module in model.named_modules():
        trained = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        if not trained or _is_pefts_own(name):
            continue
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.forward = _forward_with_float32_bias(module, compute_dtype)  # type: ignore[assignment, method-assign]
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()
        module.register_forward_pre_hook(_take_float32)
        module.register_forward_hook(lambda _module, _inputs, output: output.to(compute_dtype))


def _is_pefts_own(name: str) -> bool:
    return any(part.startswith(("lora_", "trainable_tokens_")) for part in name.split("."))


def _take_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if torch.is_floating_point(value) else value for value in inputs)


def _forward_with_float32_bias(layer: nn.Linear, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        bias = layer.bias.to(dtype)
        if isinstance(layer, Linear4bit):
            result = matmul_4bit(x.to(dtype), layer.weight, bias=bias, quant_state=layer.weight.quant_state)
        else:
            result = functional.linear(x.to(dtype), layer.weight, bias)
        return result.to(x.dtype)

    return forward


def find_non_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of a tensor that holds NaN or infinity and how many, as text; None if all are finite."""
    for name, tensor in tensors.items():
        count = tensor.numel() - int(torch.isfinite(tensor).sum())
        if count:
            return f"{name} has {count:,} of {tensor.numel():,} values that are not finite"
    return None
