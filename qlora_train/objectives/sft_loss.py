"""The loss: summed negative log-likelihood of the label tokens, with logits made only where there is a label.

The head of a 150,000-token vocabulary is the largest tensor of a step. A hook on this model's own head hands it only the
hidden states that predict a label, so that whatever the architecture does around its head (scaling, soft-capping) stays
exactly what it is, on `(num_labels, vocabulary)` instead of `(batch, seq, vocabulary)`.

Where the architecture allows it, the logits of a few labels at a time are made, and their gradient with them, or, for a
head that trains, once more in the backward pass. The head and what is around it are then run by a copy of the model's
outermost module, which shares its weights and whose decoder returns the hidden states it is given: again the
architecture's own code, with its own head.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeModelOutputWithPast

from qlora_train.kernels import host_copies
from qlora_train.kernels.ops.cross_entropy import losses_and_gradient_
from qlora_train.kernels.packed.attention import attends_by_documents, positions_of_row
from qlora_train.utils.constants import IGNORE_INDEX

FLOAT32_BYTES = 64 << 20
"""Most float32 logits that an evaluation makes at once, however large batch and vocabulary are."""

CHUNK_BYTES = {"cpu": 60 << 20, "cuda": 512 << 20}
"""Most logits that a training step makes at once, counted as float32: enough rows for good matrix products, and in 16 bits
no larger than what a CPU's allocator gives out without asking the system (32 MB)."""

LABEL_MULTIPLE = {"cpu": 32, "cuda": 1}
"""Logits under a frozen head are made of a multiple of so many rows, the last ones zeros: a CPU's product of (rows, 49152)
numbers makes a kernel for every new number of rows, and takes 14 ms for it."""

MIN_CHUNK_TOKENS = 64
"""Fewest labels whose logits are made at once: each chunk reads the whole head."""

CHUNK_TOLERANCE = 0.02
"""Nats a token by which rounding in 16 bits may change a loss whose logits are made in chunks."""


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return for each position the token to be predicted there.

    Args:
        labels: (batch, seq), IGNORED where a token carries no loss.

    Returns:
        (batch, seq); the last column is IGNORED.
    """
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


@contextmanager
def _head_sees_only(model: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Let the output head of this model see the hidden states at `places` alone, counted over all rows, (num_labels,)."""
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states = arguments[0]
        return (_at(hidden_states, places), *arguments[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _at(hidden_states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the hidden states (batch, seq, hidden) at `places`, (num_labels, hidden)."""
    return hidden_states.flatten(0, 1).index_select(0, places.to(hidden_states.device))


def _label_places(targets: torch.Tensor) -> torch.Tensor:
    """Return where there is a label, counted over the tokens of all rows, (num_labels,)."""
    return (targets != IGNORE_INDEX).flatten().nonzero()[:, 0]


@dataclass(frozen=True, slots=True)
class LabelLosses:
    """The losses of a batch.

    Attributes:
        nats: negative log-likelihood of every label token, float32 (num_labels,).
        of_row: the row of the batch that each belongs to, (num_labels,), on the host.
        balance: how unevenly the batch's tokens use the experts, a scalar; None unless it was asked for.
    """

    nll: torch.Tensor
    row_index: torch.Tensor
    aux_loss: torch.Tensor | None = None


def label_losses(
    model: nn.Module,
    chunk_tokens: int | None = None,
    /,
    *,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    with_aux_loss: bool = False,
) -> LabelLosses:
    """Return the loss of every label token.

    Args:
        model: a causal language model, with or without an adapter.
        chunk_tokens: labels whose logits exist at a time, for a model that `supports_chunking`; None: all.
        input_ids: (batch, seq).
        labels: (batch, seq), IGNORED where a token carries no loss; so is the first token of each packed document, which
            nothing predicts. Where they are on the host, as `position_ids`, the host does not wait for the device.
        attention_mask: (batch, seq), 1 for real tokens; None where all are.
        position_ids: (1, seq), those in each document of a packed row, as `FlatteningCollator` makes them; None for
            rows that are not packed.
        with_balance: also return the architecture's own load-balancing loss of a mixture of experts, over all real tokens.
    """
    device, targets, positions = input_ids.device, shifted_labels(labels.cpu()), None
    at = _label_places(targets)
    places, wanted = host_copies.to_device(at, device), host_copies.to_device(targets.flatten()[at], device)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if position_ids is not None:
        positions = position_ids.cpu()
        inputs["position_ids"] = host_copies.to_device(positions, device)
        if attends_by_documents(model) and not with_aux_loss:
            # Transformers then does not ask the device whether documents are packed
            inputs["attention_mask"] = torch.ones_like(input_ids)
    if with_aux_loss:
        inputs["output_router_logits"] = True
    if chunk_tokens is not None:
        with positions_of_row(positions):
            hidden_states, output = _hidden_states(model, places, inputs)
        nll = _losses_in_chunks(model, hidden_states, wanted, chunk_tokens)
    else:
        with positions_of_row(positions), _head_sees_only(model, places):
            output = model(**inputs)
        nll = _negative_log_likelihoods(output.logits, wanted.to(output.logits.device))
    return LabelLosses(nll, at // targets.shape[1], output.aux_loss if with_aux_loss else None)


def label_logits(model: nn.Module, *, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the logits that predict the label tokens of rows without padding, (num_labels, vocabulary).

    Args:
        model: a causal language model, with or without an adapter.
        input_ids: (batch, seq).
        labels: (batch, seq), IGNORED where a token carries no loss.
    """
    places = host_copies.to_device(_label_places(shifted_labels(labels.cpu())), input_ids.device)
    with _head_sees_only(model, places):
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def _negative_log_likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each target, float32 (num_labels,), from logits (num_labels, vocabulary) of any dtype.

    Gradients would keep every piece alive, so that pieces save memory only without them.
    """
    if torch.is_grad_enabled():
        return functional.cross_entropy(logits.float(), targets, reduction="none")
    num_rows = max(1, FLOAT32_BYTES // (4 * logits.shape[-1]))
    pieces = zip(logits.split(num_rows), targets.split(num_rows), strict=True)
    return torch.cat([functional.cross_entropy(some.float(), wanted, reduction="none") for some, wanted in pieces])


# --- in chunks --------------------------------------------------------------------------------------------------------


class _DecoderOutput(MoeModelOutputWithPast):
    """What any decoder returns, with None for the fields that only some architectures read."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _causal_model(model: Any) -> Any:
    """Return the causal language model that an adapter is on, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _decoder_name(whole: Any) -> str:
    """Return the name of the part of a causal language model that has the embeddings and the decoder layers."""
    embeddings = whole.get_input_embeddings()
    return next(name for name, part in whole.named_children() if any(embeddings is inner for inner in part.modules()))


def _hidden_states(model: nn.Module, places: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Return what the decoder returns at `places`, (num_labels, hidden), and what the model does."""
    seen: list[torch.Tensor] = []

    def take(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
        hidden_states = output.last_hidden_state
        seen.append(_at(hidden_states, places))
        output.last_hidden_state = hidden_states[:, :0]  # the head makes no logits
        return output

    whole = _causal_model(model)
    handle = whole.get_submodule(_decoder_name(whole)).register_forward_hook(take)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    (hidden_states,) = seen
    return hidden_states, output


def _head_alone(model: Any) -> tuple[nn.Module, nn.Module]:
    """Return a copy of the outermost module of a causal language model, and the copy of the decoder in it.

    The copies share all weights with the model, which is not changed.
    """
    whole = _causal_model(model)
    name = _decoder_name(whole)
    head, decoder = copy.copy(whole), copy.copy(whole.get_submodule(name))
    vars(head)["_modules"] = {**whole._modules, name: decoder}
    vars(head).pop("forward", None)  # one that was bound to the whole
    return head, decoder


LogitsOfSome = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states (n, hidden) -> logits (n, vocabulary)."""


def _losses_in_chunks(
    model: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    """Return the loss of each target, float32 (num_labels,), from what the decoder returns, (num_labels, hidden)."""
    head, decoder = _head_alone(model)

    def logits_of(some: torch.Tensor) -> torch.Tensor:
        vars(decoder)["forward"] = lambda *_arguments, **_keywords: _DecoderOutput(last_hidden_state=some[None])
        try:
            logits: torch.Tensor = head(use_cache=False).logits.flatten(0, 1)
        finally:
            del vars(decoder)["forward"]
        return logits

    def losses_of(some: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits_of(some).float(), wanted, reduction="none")

    targets = targets.to(hidden_states.device)
    own = [part for part in head.children() if part is not decoder]
    if not any(parameter.requires_grad for part in own for parameter in part.parameters()):
        losses: torch.Tensor = _FrozenHead.apply(hidden_states, targets, chunk_tokens, logits_of)
        return losses
    pieces = zip(hidden_states.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    return torch.cat([checkpoint(losses_of, some, wanted, use_reentrant=False) for some, wanted in pieces])


class _FrozenHead(torch.autograd.Function):
    """Losses under a head that does not train.

    A loss depends on its own hidden state alone. So its gradient is made at once, in the place of the logits, which are
    neither kept nor made again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, targets: torch.Tensor, chunk_tokens: int, logits_of: LogitsOfSome
    ) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        num_chunks = max(1, -(-len(targets) // chunk_tokens))
        multiple = min(LABEL_MULTIPLE[hidden_states.device.type], chunk_tokens)
        losses: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for some, wanted in zip(hidden_states.chunk(num_chunks), targets.chunk(num_chunks), strict=True):
            if not needs_gradient:
                losses.append(_negative_log_likelihoods(logits_of(some), wanted))
                continue
            leaf = some.detach().requires_grad_()
            with torch.enable_grad():
                logits = logits_of(functional.pad(leaf, (0, 0, 0, -len(leaf) % multiple)))
            made = torch.autograd.graph.get_gradient_edge(logits)  # now: of a view that has changed, autograd copies
            gradient = logits.detach()
            losses.append(losses_and_gradient_(gradient[: len(wanted)], wanted))
            gradient[len(wanted) :].zero_()
            gradients += torch.autograd.grad(made, leaf, gradient)
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * grad[:, None]).to(gradients.dtype), None, None, None


def choose_chunk_tokens(model: Any) -> int | None:
    """Return how many labels' logits a training step makes at a time; None for a model that cannot but make all."""
    if not supports_chunking(model):
        return None
    most = CHUNK_BYTES[model.device.type] // (4 * model.config.get_text_config().vocab_size)
    return max(MIN_CHUNK_TOKENS, most)


def supports_chunking(model: Any) -> bool:
    """Say whether the loss in chunks is the loss on this very model, which is run on a few tokens.

    With an adapter on it, gradients are made too: they take the place of the logits, which some operations would need. Both
    are computed as in training, since a model on the fast path rounds otherwise there than in evaluation.
    """
    whole, chunks = (_on_a_few_tokens(model, chunk_tokens, with_gradients=True) for chunk_tokens in (None, 3))
    if whole is None or chunks is None:
        return False  # an outermost module that is built otherwise
    return torch.allclose(whole.nll.detach(), chunks.nll.detach(), rtol=CHUNK_TOLERANCE, atol=CHUNK_TOLERANCE)


def has_aux_loss(model: Any) -> bool:
    """Say whether the architecture of this very model, which is run on a few tokens, has a load-balancing loss."""
    losses = _on_a_few_tokens(model, None, with_aux_loss=True)
    return losses is not None and losses.aux_loss is not None


@torch.no_grad()
def _on_a_few_tokens(
    model: Any, chunk_tokens: int | None, *, with_aux_loss: bool = False, with_gradients: bool = False
) -> LabelLosses | None:
    """Return the losses of a short text; None for a model that cannot make them in this way."""
    device, num_tokens = next(model.parameters()).device, model.config.get_text_config().vocab_size
    tokens = torch.arange(1, 9, device=device)[None] % num_tokens
    was_training = model.training
    model.eval()
    try:
        with torch.set_grad_enabled(with_gradients):
            return label_losses(model, chunk_tokens, input_ids=tokens, labels=tokens, with_aux_loss=with_aux_loss)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
        return None
    finally:
        model.train(was_training)
