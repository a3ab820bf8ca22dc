"""A mixture's experts with LoRA, with one expert's weights dequantized at a time.

For the tokens x of expert e, with weights W_e (out, in) and LoRA factors A_e, B_e of each projection:

    project(x) = x W_e' + s (x A_e') B_e' + bias_e
    y          = project_down(gate(project_up(x)))          sum over the experts of a token, times its routing weight

The backward pass dequantizes W_e again. The result is that of Transformers' experts with the weights W_e + s B_e A_e; LoRA
is applied to the tokens, not to the weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.kernels.block_sizes import padded_tokens
from qlora_train.kernels.expert_weights import ExpertLora, expert_reader


class _FrozenMatmul(torch.autograd.Function):
    """x W' (or x W) of a weight that `read` returns, in the backward pass too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[], Tensor], transposed: bool) -> Tensor:
        ctx.read, ctx.transposed = read, transposed
        weight = read().to(x.dtype)
        return x @ weight if transposed else x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.read().to(grad.dtype)
        return (grad @ weight.T if ctx.transposed else grad @ weight), None, None


def follows_interface(experts: nn.Module) -> bool:
    """Return whether a module implements Transformers' experts interface, which names its parts."""
    return all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def experts_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: Mapping[str, ExpertLora] | None = None,
) -> Tensor:
    """Return the mixture's output, (tokens, hidden), in the dtype of its input.

    Args:
        experts: a module that `follows_interface`.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k) experts of each token; ids from num_experts on mean no expert.
        top_k_weights: (tokens, k) routing weights.
        lora: by parameter name.
    """
    lora = lora or {}
    up, down = ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"
    top_k = top_k_index.shape[-1]
    sorted_experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(sorted_experts, minlength=experts.num_experts)[: experts.num_experts].tolist()
    inputs, outputs, begin = hidden_states[order // top_k], [], 0
    for index, count in enumerate(counts):
        if count:
            x = pad_tokens(inputs[begin : begin + count])
            x = _project(experts, up, lora.get(up), x, index)
            x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
            outputs.append(_project(experts, down, lora.get(down), x, index)[:count])
            begin += count
    result = torch.cat(outputs) if outputs else inputs[:0]
    if getattr(experts, "has_post_expert_norm", False):
        result = experts.post_expert_norm(result)
    weighted = result * top_k_weights.reshape(-1)[order[:begin]].unsqueeze(-1)
    by_choice = weighted.new_zeros((order.shape[0], hidden_states.shape[-1])).index_copy(0, order[:begin], weighted)
    return by_choice.view(hidden_states.shape[0], top_k, -1).sum(dim=1).to(hidden_states.dtype)


def pad_tokens(x: Tensor) -> Tensor:
    """Append zero rows to an expert's tokens, so that few different numbers of tokens occur on a CPU."""
    # for each new shape of a 16-bit product oneDNN compiles a kernel and keeps it, 0.6 MB
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return x
    return nn.functional.pad(x, (0, 0, 0, padded_tokens(x.shape[0]) - x.shape[0]))


def _project(experts: Any, name: str, lora: ExpertLora | None, x: Tensor, index: int) -> Tensor:
    read = expert_reader(experts, name)
    result: Tensor = _FrozenMatmul.apply(x, lambda: read(index), experts.is_transposed)
    if experts.has_bias:
        result = result + getattr(experts, f"{name}_bias")[index]
    if lora is not None:
        a, b = lora.a[index].to(x.dtype), lora.b[index].to(x.dtype)
        result = result + (x @ a.T @ b.T) * lora.scale
    return result
