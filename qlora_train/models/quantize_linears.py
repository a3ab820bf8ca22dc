"""Quantize the linear layers that bitsandbytes' integration skips because their class is a subclass of nn.Linear."""

import logging

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from qlora_train.config import QuantizationSection

logger = logging.getLogger(__name__)


def quantize_linears(
    model: nn.Module, class_names: tuple[str, ...], quantization: QuantizationSection, compute_dtype: torch.dtype
) -> None:
    """Replace the linear layers of these classes with 4-bit ones, one at a time, on their device.

    Args:
        model: a loaded model with these layers in 16 bits, as Transformers also stores them in 4-bit checkpoints.
        class_names: subclasses of nn.Linear with an ordinary forward, from the architecture table.
        quantization: code book and double quantization.
        compute_dtype: dtype of the matrix products.
    """
    found = [name for name, module in model.named_modules() if type(module).__name__ in class_names]
    for name in found:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} is no linear layer; the architecture table is wrong"
        model.set_submodule(name, _quantized(linear, quantization, compute_dtype))
    if found:
        logger.debug(
            "quantization: %d layers of class %s, which Transformers skips", len(found), ", ".join(class_names)
        )


def _quantized(linear: nn.Linear, quantization: QuantizationSection, compute_dtype: torch.dtype) -> Linear4bit:
    with torch.device("meta"):
        replacement = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=compute_dtype,
            compress_statistics=quantization.bnb_4bit_use_double_quant,
            quant_type=quantization.bnb_4bit_quant_type,
        )
    replacement.weight = Params4bit(
        linear.weight.data.clone(),
        requires_grad=False,
        compress_statistics=quantization.bnb_4bit_use_double_quant,
        quant_type=quantization.bnb_4bit_quant_type,
        module=replacement,
    ).to(linear.weight.device)
    replacement.bias = linear.bias
    return replacement
