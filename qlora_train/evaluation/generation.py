"""Greedy answers to held-out prompts, in left-padded batches; end-of-answer tokens."""

import datetime
from collections.abc import Sequence
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig

from qlora_train.data.chat_template import PYTHON_ERRORS, encode_chat
from qlora_train.data.special_tokens import SpecialTokens
from qlora_train.data.types import Prompt
from qlora_train.evaluation.batched_inference import (
    batches_by_length,
    compute_in_batches,
    input_device,
)
from qlora_train.utils.errors import DataError, ModelError
from qlora_train.utils.eval_mode import eval_mode


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    date: datetime.date | None = None,
) -> list[str]:
    """Return the model's greedy answer to each prompt, without special tokens.

    Turns are rendered with the chat template; plain text gets the BOS token that training gave it. Batches hold prompts of
    similar length, left-padded; they shrink where memory runs out. An answer ends at any end token of the model, the
    tokenizer or the template. Sampling and penalties of the checkpoint do not apply.

    Args:
        date: date for templates that print it; None is today.

    Raises:
        ModelError: the tokenizer has no chat template, or a single prompt does not fit into memory.
        DataError: a prompt is empty, or has a token without an embedding row.
    """
    encoded = encode_prompts(tokenizer, prompts, date or datetime.date.today())
    for number, ids in enumerate(encoded):
        if beyond := tokens_beyond_embedding(model, tokenizer, ids):
            raise DataError(f"prompt {number} has tokens that the model's embedding has no rows for: {beyond}")
    stops = stop_token_ids(model, tokenizer)
    greedy = make_generation_config(model, tokenizer, max_new_tokens=max_new_tokens)
    answers = [""] * len(prompts)
    lengths = [len(ids) + max_new_tokens for ids in encoded]

    def answer(batch: Sequence[int]) -> None:
        for index, new in zip(batch, _generate(model, [encoded[i] for i in batch], greedy), strict=True):
            end = next((at for at, token in enumerate(new) if token in stops), len(new))
            answers[index] = tokenizer.decode(new[:end], skip_special_tokens=True)

    with eval_mode(model), torch.no_grad():
        compute_in_batches(
            batches_by_length(lengths, batch_size), answer, lengths,
            setting="--batch-size", advice="lower --max-new-tokens, or shorten the prompt", task="answers",
        )  # fmt: skip
    return answers


def make_generation_config(
    model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float = 0.0
) -> GenerationConfig:
    """Return greedy decoding at temperature 0, plain sampling above; the checkpoint's own settings are overridden."""
    stops = stop_token_ids(model, tokenizer)
    pad = next(i for i in (tokenizer.pad_token_id, *stops, 0) if i is not None)
    sample = temperature > 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=sample, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        temperature=temperature if sample else 1.0, top_p=1.0, top_k=0 if sample else 50, use_cache=True,
        eos_token_id=stops or None, pad_token_id=pad,
    )  # fmt: skip


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], date: datetime.date) -> list[list[int]]:
    """Return the token ids of prompts.

    Raises:
        ModelError: the tokenizer has no chat template.
        DataError: a prompt is empty.
    """
    if not tokenizer.chat_template and any(not isinstance(prompt, str) for prompt in prompts):
        raise ModelError("the tokenizer has no chat template; set model.chat_template, e.g. to chatml")
    encoded = []
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {number} is empty; every prompt needs at least one turn, or text")
        if isinstance(prompt, str):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            encoded.append(SpecialTokens(tokenizer).bos_for(ids) + ids)
        else:
            encoded.append(encode_chat(tokenizer, prompt, date=date, add_generation_prompt=True))
    return encoded


def tokens_beyond_embedding(model: Any, tokenizer: Any, ids: Sequence[int]) -> str:
    """Describe the tokens among `ids` that have no embedding row, as text with their ids."""
    num_rows = model.get_input_embeddings().weight.shape[0]
    beyond = sorted({i for i in ids if i >= num_rows})
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in beyond)


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return all tokens that end an answer: those of the generation config and of `answer_end_ids`."""
    configured = model.generation_config.eos_token_id
    found = {*(configured if isinstance(configured, list) else [configured]), *answer_end_ids(tokenizer)}
    return sorted(token for token in found if token is not None)


def answer_end_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer in training: EOS, and the chat template's end-of-turn token if it has one."""
    ends = [tokenizer.eos_token_id, _end_of_turn(tokenizer) if tokenizer.chat_template else None]
    return list(dict.fromkeys(token for token in ends if token is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    marker = "MARKED-ANSWER"
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": marker}]
    try:
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(marker)[2]
    except (TemplateError, *PYTHON_ERRORS):  # the template refuses this conversation
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if token in special), None)


def _generate(model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    """Generate one left-padded batch; return the new tokens."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), config.pad_token_id)
    attention_mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, length - len(prompt) :] = 1
    device = input_device(model)
    output = model.generate(
        input_ids=ids.to(device), attention_mask=attention_mask.to(device), generation_config=config
    )
    new: list[list[int]] = output[:, length:].tolist()
    return new
