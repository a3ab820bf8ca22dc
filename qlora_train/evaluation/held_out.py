"""Measure a model on held-out rows: loss, and answers compared with the expected ones.

The loss is the total negative log-likelihood over the total number of label tokens, in nats a token, so that it depends
on neither batch size nor order. Nothing here knows how a model was made: base, adapter and merged model are measured
alike.
"""

import datetime
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig

from qlora_train.data.chat_template import PYTHON_ERRORS, encode_chat
from qlora_train.data.collate import Collator
from qlora_train.data.special_tokens import SpecialTokens
from qlora_train.data.types import Example, Prompt
from qlora_train.evaluation.batched_inference import batches_by_length, compute_in_batches, row_too_long
from qlora_train.evaluation.scoring import (
    AnswerScores,
    RowComparison,
    compare_row_by_row,
    few_shot_prompt,
    score_answers,
)
from qlora_train.objectives.sft_loss import FLOAT32_BYTES, label_logits, label_losses
from qlora_train.utils import signals
from qlora_train.utils.device import attempt
from qlora_train.utils.errors import DataError, ModelError

MAX_LOGITS = 1 << 28
"""Most logits of one batch of several rows; 1 GiB where something turns a model's outputs into float32."""
ONE_ROW_ADVICE = "lower data.max_length, or free memory that others use"


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

    A label at position 0 has nothing before it that could predict it, and is not counted; training does not count it
    either. A batch has fewer than `batch_size` rows where its labels' logits would be more than MAX_LOGITS, or where memory
    runs out.

    Raises:
        DataError: there is no example, or none with a label.
        ModelError: one row does not fit into memory.
        Stop: the process was asked to stop.
    """
    sizes = [(len(example.input_ids), int(np.count_nonzero(example.loss_mask[1:]))) for example in examples]
    lengths, num_labels = [length for length, _ in sizes], [count for _, count in sizes]
    if not any(num_labels):
        raise DataError(f"held-out loss: {len(examples)} rows and none with a label token; data.eval needs answers")
    nll = torch.zeros(len(examples), dtype=torch.float64)
    collate = Collator(pad_token_id)
    device = _input_device(model)
    max_labels = MAX_LOGITS // model.config.get_text_config().vocab_size

    def compute(batch: Sequence[int]) -> None:
        signals.check()
        tensors = collate([(index, examples[index]) for index in batch])
        inputs: dict[str, Any] = {name: tensors[name].to(device) for name in ("input_ids", "attention_mask")}
        losses = label_losses(model, **inputs, labels=tensors["labels"])
        nll.index_add_(0, tensors["row"][losses.of_row], losses.nats.double().cpu())

    with _evaluating(model):
        compute_in_batches(
            batches_by_length(lengths, batch_size, num_labels, max_labels), compute, lengths,
            setting="train.per_device_eval_batch_size", advice=ONE_ROW_ADVICE,
        )  # fmt: skip
    return HeldOutLoss.of([ExampleLoss(*row) for row in zip(nll.tolist(), num_labels, strict=True)])


@torch.no_grad()
def label_log_probabilities(model: Any, examples: Sequence[Example]) -> Iterator[torch.Tensor]:
    """Yield what a causal language model predicts at the labels of examples, one example after the other.

    Yields:
        Log-probabilities of all tokens at some of the labels, float32 (some, vocabulary), in the order of the labels.

    Raises:
        ModelError: one row does not fit into memory.
        Stop: the process was asked to stop.
    """
    collate, device = Collator(0), _input_device(model)
    with _evaluating(model):
        for example in examples:
            signals.check()
            tensors = collate([(0, example)])
            input_ids = tensors["input_ids"].to(device)
            logits, reason = attempt(partial(label_logits, model, input_ids=input_ids, labels=tensors["labels"]))
            if logits is None:
                raise row_too_long(len(example.input_ids), reason, ONE_ROW_ADVICE)
            for some in logits.split(max(1, FLOAT32_BYTES // (4 * logits.shape[-1]))):
                yield torch.log_softmax(some.float(), dim=-1)


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    date: datetime.date | None = None,
) -> list[str]:
    """Return the model's greedy answer to each prompt, without special tokens; deterministic.

    Turns are rendered with the chat template, plain text begins as in training. Prompts of similar length are padded
    together, on the left, at most `batch_size` of them, and fewer where memory runs out. An answer ends at any end token of
    the model, the tokenizer or the template. Sampling and penalties of the checkpoint do not apply. A template that writes
    the date gets `date`, today where it is None.

    Raises:
        ModelError: the tokenizer has no chat template, or one prompt does not fit into memory.
        DataError: a prompt is empty, or has a token that the model lacks.
    """
    encoded = _encode_prompts(tokenizer, prompts, date or datetime.date.today())
    for number, ids in enumerate(encoded):
        if beyond := tokens_beyond_embedding(model, tokenizer, ids):
            raise DataError(f"prompt {number} has tokens that the model's embedding has no rows for: {beyond}")
    stops = stop_token_ids(model, tokenizer)
    greedy = decoding(model, tokenizer, max_new_tokens=max_new_tokens)
    answers = [""] * len(prompts)
    lengths = [len(ids) + max_new_tokens for ids in encoded]

    def answer(batch: Sequence[int]) -> None:
        for index, new in zip(batch, _generate(model, [encoded[i] for i in batch], greedy), strict=True):
            end = next((at for at, token in enumerate(new) if token in stops), len(new))
            answers[index] = tokenizer.decode(new[:end], skip_special_tokens=True)

    with _evaluating(model), torch.no_grad():
        compute_in_batches(
            batches_by_length(lengths, batch_size), answer, lengths,
            setting="--batch-size", advice="lower --max-new-tokens, or shorten the prompt",
        )  # fmt: skip
    return answers


def decoding(model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float = 0.0) -> GenerationConfig:
    """Return how an answer is decoded: greedily at temperature 0, else drawn from the model's own distribution.

    Everything that a checkpoint could say of it (sampling, penalties, beams) is said here instead.
    """
    stops = stop_token_ids(model, tokenizer)
    pad = next(i for i in (tokenizer.pad_token_id, *stops, 0) if i is not None)
    drawn = temperature > 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=drawn, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        temperature=temperature if drawn else 1.0, top_p=1.0, top_k=0 if drawn else 50, use_cache=True,
        eos_token_id=stops or None, pad_token_id=pad,
    )  # fmt: skip


def _encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], date: datetime.date) -> list[list[int]]:
    if not tokenizer.chat_template and any(not isinstance(prompt, str) for prompt in prompts):
        raise ModelError("the tokenizer has no chat template; set model.chat_template, e.g. to chatml")
    encoded = []
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {number} is empty; every prompt needs at least one turn, or text")
        if isinstance(prompt, str):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            encoded.append(SpecialTokens(tokenizer).beginning_for(ids) + ids)
        else:
            encoded.append(encode_chat(tokenizer, prompt, date=date, add_generation_prompt=True))
    return encoded


def tokens_beyond_embedding(model: Any, tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the tokens among `ids` that a model's embedding has no rows for, as text with their ids."""
    num_rows = model.get_input_embeddings().weight.shape[0]
    beyond = sorted({i for i in ids if i >= num_rows})
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in beyond)


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return every token that ends an answer: the generation config's, and those of `answer_ends`."""
    configured = model.generation_config.eos_token_id
    found = {*(configured if isinstance(configured, list) else [configured]), *answer_ends(tokenizer)}
    return sorted(token for token in found if token is not None)


def answer_ends(tokenizer: Any) -> list[int]:
    """Return the tokens that a model trained with this tokenizer ends an answer with: its eos, the template's end of turn.

    A template that refuses a conversation of one question and one answer, or ends it without a special token, has none.
    """
    ends = [tokenizer.eos_token_id, _end_of_turn(tokenizer) if tokenizer.chat_template else None]
    return list(dict.fromkeys(token for token in ends if token is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    mark = "MARKED-ANSWER"
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": mark}]
    try:
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)[2]
    except (TemplateError, *PYTHON_ERRORS):
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if token in special), None)


def _generate(model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    """Return the new tokens of one left-padded batch."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), config.pad_token_id)
    present = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        present[row, length - len(prompt) :] = 1
    device = _input_device(model)
    output = model.generate(input_ids=ids.to(device), attention_mask=present.to(device), generation_config=config)
    new: list[list[int]] = output[:, length:].tolist()
    return new


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


def _input_device(model: Any) -> torch.device:
    """Return where token ids go: to the embedding; from the CPU they are brought to one that waits outside the device."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


__all__ = [
    "AnswerScores", "ExampleLoss", "HeldOutLoss", "RowComparison", "answer_ends", "compare_row_by_row", "decoding",
    "few_shot_prompt", "generate_answers", "held_out_loss", "label_log_probabilities", "score_answers", "stop_token_ids",
    "tokens_beyond_embedding",
]  # fmt: skip
