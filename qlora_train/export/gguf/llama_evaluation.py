"""Losses of rows and greedy answers to prompts with llama.cpp, by token ids. Runs in the worker."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_train.export.gguf.llama_library import DONE, load_library, load_model

BATCH_TOKENS = 512
"""Tokens per call of the model."""
LOGITS_CHUNK = 64
"""Rows of logits whose loss is computed at once, in float64."""
Logits = npt.NDArray[np.float32]


def evaluate(
    model: str,
    adapter: str,
    rows: Sequence[tuple[list[int], list[bool]]],
    prompts: Sequence[list[int]],
    stops: list[int],
    max_new_tokens: int,
    max_seconds: float | None,
    num_threads: int,
) -> dict[str, Any]:
    """Return each row's negative log-likelihood in nats, and the greedy answer to each prompt as token ids.

    Args:
        adapter: LoRA file that is applied to the model; empty for none.
        rows: token ids, and for each whether it is a label.
        stops: tokens that end an answer.
        max_seconds: for rows and for answers each; the first row and the first answer are always computed.
    """
    length = max([1, *(len(ids) for ids, _ in rows), *(len(ids) + max_new_tokens for ids in prompts)])
    with _opened(model, adapter, length, num_threads) as llama:
        losses = list(_until(max_seconds, rows, lambda row: llama.nll(*row)))
        answers = list(_until(max_seconds, prompts, lambda ids: llama.answer(ids, stops, max_new_tokens)))
    return {"nll": losses, "answers": answers}


def _until(max_seconds: float | None, items: Sequence[Any], compute: Callable[[Any], Any]) -> Iterator[Any]:
    start = time.monotonic()
    for number, item in enumerate(items):
        if number and max_seconds is not None and time.monotonic() - start > max_seconds:
            return
        yield compute(item)
        print(f"{DONE}: {number}", flush=True)


class _Llama:
    """A loaded model with a context of one sequence."""

    def __init__(self, library: Any, context: Any, batch: Any, num_vocab: int) -> None:
        self._library, self._context, self._batch, self._num_vocab = library, context, batch, num_vocab

    def nll(self, ids: list[int], is_label: list[bool]) -> float:
        """Return the negative log-likelihood of a row's labels; a label at position 0 does not count."""
        self._clear()
        targets = np.array([*ids[1:], 0])
        predicts = np.array([*is_label[1:], False])
        total = 0.0
        for start in range(0, len(ids), BATCH_TOKENS):
            part = slice(start, start + BATCH_TOKENS)
            logits = self._decode(ids[part], start, predicts[part].tolist())
            expected = targets[part][predicts[part]]
            for first in range(0, len(logits), LOGITS_CHUNK):
                chunk = slice(first, first + LOGITS_CHUNK)
                total += _nll(logits[chunk], expected[chunk])
        return total

    def answer(self, prompt: list[int], stops: list[int], max_new_tokens: int) -> list[int]:
        """Return the most likely token after the prompt, and so on until a stop token, which is left out."""
        self._clear()
        for start in range(0, len(prompt), BATCH_TOKENS):
            part = prompt[start : start + BATCH_TOKENS]
            is_last = start + len(part) == len(prompt)
            logits = self._decode(part, start, [False] * (len(part) - 1) + [is_last])
        tokens: list[int] = []
        while (token := int(logits[0].argmax())) not in stops:
            tokens.append(token)
            if len(tokens) == max_new_tokens:
                break
            logits = self._decode([token], len(prompt) + len(tokens) - 1, [True])
        return tokens

    def _clear(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _decode(self, ids: list[int], position: int, wants_logits: list[bool]) -> Logits:
        """Feed tokens and return the logits of those that want them, (number, vocabulary); valid until the next call."""
        if max(ids) >= self._num_vocab:
            raise SystemExit(f"token {max(ids)} is beyond the {self._num_vocab} tokens of the file")
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, (token, wanted) in enumerate(zip(ids, wants_logits, strict=True)):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position + i, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if (status := self._library.llama_decode(self._context, batch)) != 0:
            raise SystemExit(f"llama.cpp cannot compute with the file (status {status})")
        shape = sum(wants_logits), self._num_vocab
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), shape)


def _nll(logits: Logits, targets: npt.NDArray[Any]) -> float:
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    return float((np.log(np.exp(values).sum(-1)) - values[np.arange(len(targets)), targets]).sum())


def _apply(library: Any, model: Any, context: Any, adapter: str) -> None:
    """Add a LoRA file to a context, at full strength."""
    loaded = library.llama_adapter_lora_init(model, adapter.encode())
    status = 1
    if loaded:
        status = library.llama_set_adapters_lora(context, (c_void_p * 1)(loaded), 1, (c_float * 1)(1.0))
    if status != 0:
        raise SystemExit(f"llama.cpp cannot apply {Path(adapter).name} to the model")


@contextmanager
def _opened(model: str, adapter: str, length: int, num_threads: int) -> Iterator[_Llama]:
    library = load_library()
    loaded = load_model(library, Path(model))
    settings = library.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = length, BATCH_TOKENS, BATCH_TOKENS
    context = library.llama_init_from_model(loaded, settings)
    if not context:
        raise SystemExit("llama.cpp cannot compute with the file")
    if adapter:
        _apply(library, loaded, context, adapter)
    library.llama_set_n_threads(context, num_threads, num_threads)
    num_vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(loaded))
    yield _Llama(library, context, library.llama_batch_init(BATCH_TOKENS, 0, 1), num_vocab)
    library.llama_free(context)
    library.llama_model_free(loaded)
