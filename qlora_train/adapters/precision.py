"""Trainable parameters in float32: bfloat16 would round small updates to zero, and a resumed run would differ."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from torch.nn import functional

from qlora_train.kernels.frozen_weight import packed_weight


def train_in_float32(model: PeftModel, compute_dtype: torch.dtype) -> None:
    """Cast trainable parameters to float32, and wrap the forward of trained base modules accordingly.

    PEFT casts the inputs of LoRA and token rows. A trained head, norm or embedding computes in float32 and returns the
    compute dtype. A linear layer with only its bias trained keeps its weight (tied or in 4 bits).
    """
    for name, module in model.named_modules():
        trained = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        if not trained or _is_peft_module(name):
            continue
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.forward = _forward_with_float32_bias(module, compute_dtype)  # type: ignore[assignment, method-assign]
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()
        module.register_forward_pre_hook(_cast_to_float32)
        module.register_forward_hook(lambda _module, _inputs, output: output.to(compute_dtype))


def _is_peft_module(name: str) -> bool:
    return any(part.startswith(("lora_", "trainable_tokens_")) for part in name.split("."))


def _cast_to_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if torch.is_floating_point(value) else value for value in inputs)


def _forward_with_float32_bias(layer: nn.Linear, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        # bitsandbytes would replace the float32 bias by a rounded one in its first forward
        bias = layer.bias.to(dtype)
        if isinstance(layer, Linear4bit):
            weight, quant_state = packed_weight(layer)
            result = matmul_4bit(x.to(dtype), weight, bias=bias, quant_state=quant_state)
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
