"""Negative log-likelihood of the label tokens, which every objective is made of, with logits for label tokens only.

With a vocabulary of 150,000 tokens the logits are the largest tensor of a step. A pre-hook on the model's own head selects
the hidden states that predict a label: logits are (num_labels, vocabulary) instead of (batch, seq, vocabulary), and scaling
or soft-capping around the head stay the architecture's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_train.kernels import host_copies
from qlora_train.kernels.fsdp_units import reset_after_failure
from qlora_train.kernels.packed.row_positions import packed_row, uses_packed_attention
from qlora_train.objectives.chunk_sizes import max_chunk_tokens
from qlora_train.objectives.chunked_loss import (
    chunked_losses,
    negative_log_likelihood,
    select,
    selected_hidden_states,
)
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.cpu_memory import return_freed_memory
from qlora_train.utils.eval_mode import eval_mode

CHUNK_TOLERANCE = 0.02
"""Max difference of a chunked loss, in nats per token: rounding in 16 bits."""


@dataclass(frozen=True, slots=True)
class LabelLosses:
    """The losses of a batch.

    Attributes:
        nll: negative log-likelihood of each label token, float32 (num_labels,).
        row_index: row of the batch of each label token, (num_labels,), on the host.
        aux_loss: load-balancing loss of a mixture of experts, a scalar; None unless requested.
    """

    nll: Tensor
    row_index: Tensor
    aux_loss: Tensor | None = None


def label_losses(
    model: nn.Module,
    chunk_tokens: int | None = None,
    /,
    *,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    with_aux_loss: bool = False,
) -> LabelLosses:
    """Return the loss of every label token. Labels and position ids on the host avoid a device synchronization.

    Args:
        model: a causal language model, with or without an adapter.
        chunk_tokens: labels per chunk of logits, for a model that `supports_chunking`; None: all.
        input_ids: (batch, seq).
        labels: (batch, seq), IGNORE_INDEX for masked tokens and the first token of each packed document.
        attention_mask: (batch, seq), 1 for real tokens; None: all are.
        position_ids: (1, seq), restarting at each document of a packed row; None: not packed.
        with_aux_loss: also return the architecture's load-balancing loss over all real tokens.
    """
    device, targets, host_position_ids = input_ids.device, _shifted(labels.cpu()), None
    label_positions = _label_positions(targets)
    positions = host_copies.to_device(label_positions, device)
    label_tokens = host_copies.to_device(targets.flatten()[label_positions], device)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if position_ids is not None:
        host_position_ids = position_ids.cpu()
        inputs["position_ids"] = host_copies.to_device(host_position_ids, device)
        if uses_packed_attention(model) and not with_aux_loss:
            # without a mask Transformers reads from the device whether documents are packed
            inputs["attention_mask"] = torch.ones_like(input_ids)
    if with_aux_loss:
        inputs["output_router_logits"] = True
    with packed_row(host_position_ids):
        if chunk_tokens is None:
            with _head_sees_only(model, positions):
                output = model(**inputs)
            nll = negative_log_likelihood(output.logits, label_tokens.to(output.logits.device))
        else:
            hidden_states, output = selected_hidden_states(model, positions, inputs)
            nll = chunked_losses(model, hidden_states, label_tokens, chunk_tokens)
    return LabelLosses(nll, label_positions // targets.shape[1], output.aux_loss if with_aux_loss else None)


def label_logits(model: nn.Module, *, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return the logits that predict the label tokens, (num_labels, vocabulary).

    Args:
        model: a causal language model, with or without an adapter.
        input_ids: (batch, seq), without padding.
        labels: (batch, seq), IGNORE_INDEX for masked tokens.
    """
    positions = host_copies.to_device(_label_positions(_shifted(labels.cpu())), input_ids.device)
    with _head_sees_only(model, positions):
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def _shifted(labels: Tensor) -> Tensor:
    """Return the label that each position predicts, (batch, seq)."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _label_positions(targets: Tensor) -> Tensor:
    """Return the positions of labels in the flattened batch, (num_labels,)."""
    return (targets != IGNORE_INDEX).flatten().nonzero()[:, 0]


@contextmanager
def _head_sees_only(model: nn.Module, positions: Tensor) -> Iterator[None]:
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select_positions(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if arguments[0].device.type == "cpu" and not torch.is_grad_enabled():
            return_freed_memory()  # of the layers: logits are larger than any gap between their tensors
        return (select(arguments[0], positions), *arguments[1:])

    handle = head.register_forward_pre_hook(select_positions)
    try:
        yield
    finally:
        handle.remove()


# --- what a model supports, found by running it on a few tokens -------------------------------------------------------


def choose_chunk_tokens(model: Any) -> int | None:
    """Return the number of labels per chunk in training; None if the model needs all logits at once."""
    if not supports_chunking(model):
        return None
    return max_chunk_tokens(model.device.type, model.config.get_text_config().vocab_size)


def supports_chunking(model: Any) -> bool:
    """Return whether the chunked loss of a model with an adapter matches its loss.

    Gradients are computed too: they overwrite the logits, which some operations need. So both losses are computed as in
    training, where fused kernels round differently.
    """
    expected, actual = (_probe(model, chunk_tokens, with_gradients=True) for chunk_tokens in (None, 3))
    if expected is None or actual is None:
        return False
    return torch.allclose(expected.nll.detach(), actual.nll.detach(), rtol=CHUNK_TOLERANCE, atol=CHUNK_TOLERANCE)


def has_aux_loss(model: Any) -> bool:
    """Return whether the model's architecture has a load-balancing loss."""
    losses = _probe(model, None, with_aux_loss=True)
    return losses is not None and losses.aux_loss is not None


@torch.no_grad()
def _probe(
    model: Any, chunk_tokens: int | None, *, with_aux_loss: bool = False, with_gradients: bool = False
) -> LabelLosses | None:
    """Return the losses of a few tokens; None if the model does not support it."""
    device, vocab_size = next(model.parameters()).device, model.config.get_text_config().vocab_size
    tokens = torch.arange(1, 9, device=device)[None] % vocab_size
    try:
        with eval_mode(model), torch.set_grad_enabled(with_gradients):
            return label_losses(model, chunk_tokens, input_ids=tokens, labels=tokens, with_aux_loss=with_aux_loss)
    except torch.OutOfMemoryError:  # no evidence against the model
        raise
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
        reset_after_failure(model)
        return None
