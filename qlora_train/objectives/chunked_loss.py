"""Chunked cross-entropy: the logits of some labels at a time.

The head, with scaling or soft-capping around it, is run by a shallow copy of the model's outermost module. The copy shares
all weights, and has a `_GivenStates` module in place of its decoder: the architecture's own code around its own head.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeModelOutputWithPast

from qlora_train.kernels.fsdp_units import own_class
from qlora_train.kernels.fused_mode import fused_kernels_apply
from qlora_train.kernels.ops.cross_entropy import losses_and_gradient_
from qlora_train.objectives.chunk_sizes import EVAL_LOGITS_BYTES, LABEL_MULTIPLE

LogitsOf = Callable[[Tensor], Tensor]
"""Hidden states (n, hidden) -> logits (n, vocabulary)."""


def select(hidden_states: Tensor, positions: Tensor) -> Tensor:
    """Return hidden states (batch, seq, hidden) at `positions` in the flattened batch, (num_labels, hidden)."""
    return hidden_states.flatten(0, 1).index_select(0, positions.to(hidden_states.device))


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each target, float32 (num_labels,), from logits (num_labels, vocabulary) of any dtype."""
    if torch.is_grad_enabled():  # autograd would keep all chunks alive
        return functional.cross_entropy(logits.float(), targets, reduction="none")
    num_rows = max(1, EVAL_LOGITS_BYTES // (4 * logits.shape[-1]))
    chunks = zip(logits.split(num_rows), targets.split(num_rows), strict=True)
    return torch.cat([functional.cross_entropy(chunk.float(), target, reduction="none") for chunk, target in chunks])


def selected_hidden_states(model: nn.Module, positions: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Run a model without its head.

    Returns:
        The decoder's output at `positions` of the flattened batch, (num_labels, hidden), and the model's output.
    """
    selected: list[Tensor] = []

    def take(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
        selected.append(select(output.last_hidden_state, positions))
        output.last_hidden_state = output.last_hidden_state[:, :0]  # no logits
        return output

    causal_lm = _causal_lm(model)
    handle = causal_lm.get_submodule(_decoder_name(causal_lm)).register_forward_hook(take)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    (hidden_states,) = selected
    return hidden_states, output


def chunked_losses(model: nn.Module, hidden_states: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """Return the loss of each target, float32 (num_labels,), from the decoder's output, (num_labels, hidden)."""
    head, states = _detached_head(model)

    def logits_of(chunk: Tensor) -> Tensor:
        states.hidden_states = chunk[None]
        logits: Tensor = head(use_cache=False).logits.flatten(0, 1)
        return logits

    def losses_of(chunk: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(logits_of(chunk).float(), target, reduction="none")

    targets = targets.to(hidden_states.device)
    parts = [part for part in head.children() if part is not states]
    if not any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        losses: Tensor = _FrozenHead.apply(hidden_states, targets, chunk_tokens, logits_of)
        return losses
    chunks = zip(hidden_states.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    return torch.cat([checkpoint(losses_of, chunk, target, use_reentrant=False) for chunk, target in chunks])


class _DecoderOutput(MoeModelOutputWithPast):
    """Any decoder's output, with None for fields that only some architectures read."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenStates(nn.Module):
    """Takes the place of a decoder: returns `hidden_states`, (1, n, hidden); other attributes are the decoder's."""

    hidden_states: Tensor

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        vars(self)["_decoder"] = decoder  # no child: it has parameters and hooks

    def forward(self, *_arguments: Any, **_keywords: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=self.hidden_states)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_decoder"], name)


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _decoder_name(causal_lm: Any) -> str:
    """Return the name of the child that contains the embeddings."""
    embeddings = causal_lm.get_input_embeddings()
    children = causal_lm.named_children()
    return next(name for name, part in children if any(embeddings is inner for inner in part.modules()))


def _detached_head(model: Any) -> tuple[nn.Module, _GivenStates]:
    """Return a shallow copy of the outermost module of a causal language model, and the module in place of its decoder."""
    causal_lm = _causal_lm(model)
    name = _decoder_name(causal_lm)
    head, states = _shallow_copy(causal_lm), _GivenStates(causal_lm.get_submodule(name))
    vars(head)["_modules"] = {**causal_lm._modules, name: states}
    return head, states


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Return a module with the same weights, without what is bound to the original: a forward of its own, and hooks.

    FSDP's hooks belong to forward passes of the whole model, and the constructor of its classes is not theirs.
    """
    copied: nn.Module = object.__new__(own_class(module))
    state = {name: value for name, value in vars(module).items() if name != "forward"}
    copied.__dict__.update(state, _forward_pre_hooks=OrderedDict(), _forward_hooks=OrderedDict())
    return copied


class _FrozenHead(torch.autograd.Function):
    """Losses under a frozen head, whose gradients overwrite the logits in the forward pass: nothing is recomputed."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, targets: Tensor, chunk_tokens: int, logits_of: LogitsOf) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        num_chunks = max(1, -(-len(targets) // chunk_tokens))
        multiple = min(LABEL_MULTIPLE[hidden_states.device.type], chunk_tokens)
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for chunk, target in zip(hidden_states.chunk(num_chunks), targets.chunk(num_chunks), strict=True):
            if not needs_gradient and not fused_kernels_apply():
                losses.append(negative_log_likelihood(logits_of(chunk), target))
                continue
            leaf = chunk.detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                logits = logits_of(functional.pad(leaf, (0, 0, 0, -len(leaf) % multiple)))
            # before the overwrite: autograd copies modified views
            edge = torch.autograd.graph.get_gradient_edge(logits) if needs_gradient else None
            gradient = logits.detach()
            losses.append(losses_and_gradient_(gradient[: len(target)], target))
            if edge is None:
                continue
            gradient[len(target) :].zero_()
            gradients += torch.autograd.grad(edge, leaf, gradient)
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * grad[:, None]).to(gradients.dtype), None, None, None
