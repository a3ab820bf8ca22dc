"""A mixture's experts with low-rank changes, without ever holding more than one expert's weights in 16 bits.

For the tokens x that the router gave to expert e, with weights W of (out, in) and the low-rank change of each projection:

    project(x) = x W_e' + s (x A_e') B_e' + bias_e
    y          = project_down(gate(project_up(x)))          sum over the experts of a token, times its routing weight

The backward pass dequantises W_e again instead of keeping it. What is computed is what Transformers' experts compute with
the weights W_e + s B_e A_e; the low-rank part is applied to the tokens, not to the weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.kernels.expert_weights import LowRankStack, expert_reader


class _FrozenProduct(torch.autograd.Function):
    """x W' (or x W) of a weight that `read` makes, and makes again in the backward pass."""

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
    """Say whether a module keeps to Transformers' interface for experts, whose parts are then known by name."""
    return all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def projections(experts: Any) -> tuple[str, str]:
    """Return the parameter names of the first and the second projection."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def experts_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    changes: Mapping[str, LowRankStack] | None = None,
) -> Tensor:
    """Return the mixture's output, (tokens, hidden), in the dtype of its input.

    Args:
        experts: a module that `follows_interface`.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k) expert of each choice; ids from num_experts on mean no expert.
        top_k_weights: (tokens, k) routing weights.
        changes: low-rank changes by parameter name.
    """
    changes = changes or {}
    up, down = projections(experts)
    num_choices = top_k_index.shape[-1]
    chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(chosen, minlength=experts.num_experts)[: experts.num_experts].tolist()
    token = order // num_choices
    inputs, outputs, begin = hidden_states[token], [], 0
    for index, count in enumerate(counts):
        if count:
            x = _project(experts, up, changes.get(up), inputs[begin : begin + count], index)
            x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
            outputs.append(_project(experts, down, changes.get(down), x, index))
            begin += count
    result = torch.cat(outputs) if outputs else inputs[:0]
    if getattr(experts, "has_post_expert_norm", False):
        result = experts.post_expert_norm(result)
    weighted = result * top_k_weights.reshape(-1)[order[:begin]].unsqueeze(-1)
    by_choice = weighted.new_zeros((order.shape[0], hidden_states.shape[-1])).index_copy(0, order[:begin], weighted)
    summed = by_choice.view(hidden_states.shape[0], num_choices, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)


def _project(experts: Any, name: str, change: LowRankStack | None, x: Tensor, index: int) -> Tensor:
    read = expert_reader(experts, name)
    result: Tensor = _FrozenProduct.apply(x, lambda: read(index), experts.is_transposed)
    if experts.has_bias:
        result = result + getattr(experts, f"{name}_bias")[index]
    if change is not None:
        a, b = change.a[index].to(x.dtype), change.b[index].to(x.dtype)
        result = result + (x @ a.T @ b.T) * change.scale
    return result
