"""4-bit loading with Transformers' quantizer for bitsandbytes, extended to experts.

Transformers quantizes each parameter before it reads the next, but linear layers alone: fused experts, most of a mixture's
weights, would stay in 16 bits. This quantizer quantizes each expert's matrix, and leaves routers in 16 bits.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from qlora_train.kernels.expert_linear import experts_forward, follows_interface
from qlora_train.kernels.expert_weights import ExpertWeights, parametrize_experts, quantize_stack
from qlora_train.models.malloc_trim import MemoryTrimmer
from qlora_train.models.moe import expert_modules, expert_parameters, routers
from qlora_train.utils.run_events import Counter

METHOD = "qlora_train_4bit"
EXPERTS_IMPLEMENTATION = "qlora_train_4bit"

ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


SHARDED_LOAD: ContextVar[Any] = ContextVar("sharded load", default=None)
"""The `ShardedLoad` in progress, if a rank loads in part: Transformers makes the quantizer, from settings in JSON."""


@register_quantization_config(METHOD)
class QuantizationConfig(BitsAndBytesConfig):
    """bitsandbytes' 4-bit settings, for linear layers and experts."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class Quantizer(Bnb4BitHfQuantizer):
    """Transformers' bitsandbytes quantizer, with experts in 4 bits and routers in 16."""

    def __init__(self, quantization_config: QuantizationConfig, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        self.expert_names: tuple[str, ...] = ()
        self.experts: dict[str, ExpertWeights] = {}
        self.sharded = SHARDED_LOAD.get()
        self.counter = Counter("loading and quantizing", None, "weights")

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **arguments: Any) -> None:
        self.expert_names = tuple(expert_parameters(model))
        named = self.quantization_config.llm_int8_skip_modules or ()
        self.quantization_config.llm_int8_skip_modules = modules_to_not_convert(model, named)
        super()._process_model_before_weight_loading(model, device_map, **arguments)
        if self.sharded is not None:
            self.sharded.choose(model, self, self.expert_names)
        num_linears = sum(isinstance(module, Linear4bit) for module in model.modules())
        self.counter.total = num_linears + len(self.expert_names)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **arguments: Any) -> bool:
        """Whether to store a parameter in 4 bits, or in part."""
        own = (*self.expert_names, *(self.sharded.sliced if self.sharded is not None else ()))
        return param_name in own or super().param_needs_quantization(model, param_name, **arguments)

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes a parameter."""
        return _Quantize(self, super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: Any, **arguments: Any) -> Any:
        for name in self.expert_names:
            module_name, _, parameter = name.rpartition(".")
            parametrize_experts(model.get_submodule(module_name), parameter, self.experts.pop(name))
        modules = [module for _, module in expert_modules(model)]
        if modules and all(follows_interface(module) for module in modules):
            model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        # to other libraries it is a bitsandbytes model
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        return super()._process_model_after_weight_loading(model, **arguments)


def modules_to_not_convert(model: Any, named: Iterable[str]) -> list[str]:
    """Return `named`, the routers, and the library's default (output head, tied modules), which `named` would replace."""
    return [*named, *get_keys_to_not_convert(model), *routers(model)]


class _Quantize(ConversionOps):
    """Quantize experts; pass all other parameters to bitsandbytes' operation."""

    def __init__(self, quantizer: Quantizer, linears: ConversionOps) -> None:
        self.quantizer, self.linears = quantizer, linears
        self.memory = MemoryTrimmer()

    def convert(self, input_dict: dict[str, Any], **arguments: Any) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        sharded = self.quantizer.sharded
        for name, value in input_dict.items():
            for tensor in value if isinstance(value, list) else [value]:
                self.memory.count(tensor)
            tensor = value[0] if isinstance(value, list) else value
            part = None
            if sharded is not None:
                part = sharded.convert(name, tensor, arguments["model"], self.quantizer, self.memory)
            if part is not None:
                result[name] = part
            elif name in self.quantizer.expert_names:
                result[name] = self._quantize_experts(name, tensor)
            else:
                result |= self.linears.convert({name: value}, **arguments)
        self.quantizer.counter.advance(len(input_dict))
        return result

    def _quantize_experts(self, name: str, value: torch.Tensor) -> torch.Tensor:
        config = self.quantizer.quantization_config
        quantized = quantize_stack(
            map(self.memory.count, value),
            quant_type=config.bnb_4bit_quant_type,
            double_quant=config.bnb_4bit_use_double_quant,
        )
        self.quantizer.experts[name] = ExpertWeights(quantized.states)
        return nn.Parameter(quantized.codes, requires_grad=False)
