"""A mixture's experts in 4 bits without numbers, for counting bytes."""

from collections.abc import Iterator

from torch import nn

from qlora_train.kernels.expert_weights import ExpertWeights, parametrize_experts, quantize_stack
from qlora_train.models.moe import expert_parameters


def quantize_experts(base: nn.Module) -> Iterator[str]:
    """Store the experts of a model on the meta device as the loader does, and yield the full names of their parameters."""
    for full_name, module in expert_parameters(base).items():
        name = full_name.rpartition(".")[2]
        quantized = quantize_stack(getattr(module, name), quant_type="nf4", double_quant=True)
        setattr(module, name, nn.Parameter(quantized.codes, requires_grad=False))
        parametrize_experts(module, name, ExpertWeights(quantized.states))
        yield full_name
