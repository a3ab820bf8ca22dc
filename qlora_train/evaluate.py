"""Measure a model on held-out rows: loss, and answers compared with the expected ones.

The loss is the total negative log-likelihood over the total number of label tokens, in nats a token, so that it depends
on neither batch size nor order. Nothing here knows how a model was made: base, adapter and merged model are measured
alike.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig

from qlora_train.data.types import Example, Message
from qlora_train.errors import DataError, ModelError
from qlora_train.scoring import AnswerScores, RowComparison, compare_row_by_row, few_shot_prompt, score_answers

_FP32_LOGITS = 1 << 24
"""Most float32 logits that exist at once (64 MiB), however large batch and vocabulary are."""


@dataclass(frozen=True)
class ExampleLoss:
    """Total negative log-likelihood of an example's labels in nats, and their number."""

    nll: float
    num_tokens: int


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss over examples; `per_example` is in their order."""

    nll: float
    num_tokens: int
    per_example: tuple[ExampleLoss, ...]

    @property
    def loss(self) -> float:
        """Nats a label token."""
        return self.nll / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), infinity where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @classmethod
    def of(cls, per_example: Sequence[ExampleLoss]) -> Self:
        """Add up examples."""
        return cls(math.fsum(e.nll for e in per_example), sum(e.num_tokens for e in per_example), tuple(per_example))


@torch.no_grad()
def held_out_loss(model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int) -> HeldOutLoss:
    """Return the loss of a causal language model on examples; its training mode is restored.

    Log-probabilities are float32 and exist only at labelled positions. A label at position 0 has nothing before it that
    could predict it, and is not counted; training does not count it either.

    Raises:
        DataError: there is no example, or none with a label.
    """
    if not any(any(example.loss_mask[1:]) for example in examples):
        raise DataError(f"held-out loss: {len(examples)} rows and none with a label token; data.eval needs answers")
    losses: list[ExampleLoss | None] = [None] * len(examples)
    selects = _selects_positions(model)
    with _evaluating(model):
        for batch in _batches([len(example.input_ids) for example in examples], batch_size):
            rows = _batch_losses(model, [examples[i] for i in batch], pad_token_id, selects)
            for index, row in zip(batch, rows, strict=True):
                losses[index] = row
    return HeldOutLoss.of([loss for loss in losses if loss is not None])


def _batch_losses(model: Any, examples: Sequence[Example], pad_token_id: int, selects: bool) -> list[ExampleLoss]:
    """Run one right-padded batch; only positions that predict some row's label get logits where the model can select."""
    length = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), length), pad_token_id)
    labelled = torch.zeros(ids.shape, dtype=torch.bool)
    present = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        end = len(example.input_ids)
        ids[row, :end] = torch.tensor(example.input_ids)
        labelled[row, :end] = torch.tensor(example.loss_mask)
        present[row, :end] = 1
    predicts, targets = labelled[:, 1:], ids[:, 1:]
    columns = predicts.any(dim=0).nonzero().squeeze(1)
    if columns.numel() == 0:
        return [ExampleLoss(0.0, 0)] * len(examples)
    device = model.get_input_embeddings().weight.device
    chosen = {"logits_to_keep": columns.to(device)} if selects else {}
    output = model(input_ids=ids.to(device), attention_mask=present.to(device), use_cache=False, **chosen)
    logits = output.logits if selects else output.logits[:, columns.to(output.logits.device)]
    nll = _nll_where(logits, targets[:, columns], predicts[:, columns])
    return [ExampleLoss(float(n), int(count)) for n, count in zip(nll, predicts.sum(dim=1), strict=True)]


def _nll_where(logits: torch.Tensor, targets: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return each row's total negative log-likelihood, shape (batch,), float64.

    Args:
        logits: (batch, position, vocabulary) in any dtype; turned to float32 a piece at a time.
        targets: (batch, position).
        where: (batch, position), true at labels.
    """
    rows, columns = where.nonzero(as_tuple=True)
    totals = torch.zeros(len(where), dtype=torch.float64)
    piece = max(1, _FP32_LOGITS // logits.shape[-1])
    for start in range(0, len(rows), piece):
        r, c = rows[start : start + piece], columns[start : start + piece]
        picked = logits[r.to(logits.device), c.to(logits.device)].float()
        nll = nn.functional.cross_entropy(picked, targets[r, c].to(logits.device), reduction="none")
        totals.index_add_(0, r, nll.double().cpu())
    return totals


def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """Return the model's greedy answer to each prompt, without special tokens; deterministic.

    Prompts are rendered with the chat template and padded on the left, prompts of like length together. An answer ends
    at any end token of the model, the tokenizer or the template. Sampling and penalties of the checkpoint do not apply.

    Raises:
        ModelError: the tokenizer has no chat template.
        DataError: a prompt is empty.
    """
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template; set model.chat_template, e.g. to chatml")
    empty = [number for number, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise DataError(f"prompt {empty[0]} has no turns; every prompt needs at least one")
    encoded = [_encode_prompt(tokenizer, prompt) for prompt in prompts]
    stops = stop_token_ids(model, tokenizer)
    pad = next(i for i in (tokenizer.pad_token_id, *stops, 0) if i is not None)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        temperature=1.0, top_p=1.0, top_k=50, use_cache=True, eos_token_id=stops or None, pad_token_id=pad,
    )  # fmt: skip
    answers = [""] * len(prompts)
    with _evaluating(model), torch.no_grad():
        for batch in _batches([len(ids) for ids in encoded], batch_size):
            for index, new in zip(batch, _generate(model, [encoded[i] for i in batch], greedy), strict=True):
                end = next((at for at, token in enumerate(new) if token in stops), len(new))
                answers[index] = tokenizer.decode(new[:end], skip_special_tokens=True)
    return answers


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return every token that ends an answer: the generation config's, the tokenizer's, the template's end of turn."""
    configured = model.generation_config.eos_token_id
    found = set(configured if isinstance(configured, list) else [configured])
    found.add(tokenizer.eos_token_id)
    mark = "MARKED-ANSWER"
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": mark}]
    tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)[2]
    after = tokenizer(tail, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    found.add(next((token for token in after if token in special), None))
    return sorted(token for token in found if token is not None)


def _encode_prompt(tokenizer: Any, prompt: Sequence[Message]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    return ids


def _generate(model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    """Return the new tokens of one left-padded batch."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), config.pad_token_id)
    present = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        present[row, length - len(prompt) :] = 1
    device = model.get_input_embeddings().weight.device
    output = model.generate(input_ids=ids.to(device), attention_mask=present.to(device), generation_config=config)
    new: list[list[int]] = output[:, length:].tolist()
    return new


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield positions in batches of like length, longest first, so that a batch too large for memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put every module into evaluation mode and back into the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _selects_positions(model: Any) -> bool:
    """Say whether the model computes logits at chosen positions only (its forward knows `logits_to_keep`)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


__all__ = [
    "AnswerScores", "ExampleLoss", "HeldOutLoss", "RowComparison", "compare_row_by_row", "few_shot_prompt",
    "generate_answers", "held_out_loss", "score_answers", "stop_token_ids",
]  # fmt: skip
