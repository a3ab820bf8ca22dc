"""The loss: summed negative log-likelihood of the label tokens, with logits made only where there is a label.

The head of a 150,000-token vocabulary is the largest tensor of a step. A hook on this model's own head hands it only the
hidden states that predict a label, so that whatever the architecture does around its head (scaling, soft-capping) stays
exactly what it is, on `(num_labels, vocabulary)` instead of `(batch, seq, vocabulary)`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

IGNORED = -100
"""Label of a token without loss, as torch's cross-entropy and Transformers have it."""

FLOAT32_BYTES = 64 << 20
"""Most float32 logits that a loss without gradients makes at once, however large its batch and vocabulary are."""


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return for each position the token to be predicted there.

    Args:
        labels: (batch, seq), IGNORED where a token carries no loss.

    Returns:
        (batch, seq); the last column is IGNORED.
    """
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


@contextmanager
def _head_sees_only(model: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Let the output head of this model see only the hidden states at `positions` (batch, seq), a boolean mask."""
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states = arguments[0]
        return (hidden_states[positions.to(hidden_states.device)], *arguments[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def label_losses(
    model: nn.Module,
    *,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of every label token.

    Args:
        model: a causal language model, with or without an adapter.
        input_ids: (batch, seq).
        labels: (batch, seq), IGNORED where a token carries no loss; so is the first token of each packed document, which
            nothing predicts.
        attention_mask: (batch, seq), 1 for real tokens; None where all are.
        position_ids: (1, seq), restarting at 0 in each document of a packed row; None for rows that are not packed.

    Returns:
        Negative log-likelihoods in nats, float32 (num_labels,), and the row of the batch each belongs to (num_labels,).
    """
    targets = shifted_labels(labels)
    positions = targets != IGNORED
    positioned = {} if position_ids is None else {"position_ids": position_ids}
    with _head_sees_only(model, positions):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positioned).logits
    return _negative_log_likelihoods(logits, targets[positions].to(logits.device)), positions.nonzero()[:, 0]


def _negative_log_likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each target, float32 (num_labels,), from logits (num_labels, vocabulary) of any dtype.

    Gradients would keep every piece alive, so that pieces save memory only without them.
    """
    if torch.is_grad_enabled():
        return functional.cross_entropy(logits.float(), targets, reduction="none")
    num_rows = max(1, FLOAT32_BYTES // (4 * logits.shape[-1]))
    pieces = zip(logits.split(num_rows), targets.split(num_rows), strict=True)
    return torch.cat([functional.cross_entropy(some.float(), wanted, reduction="none") for some, wanted in pieces])
