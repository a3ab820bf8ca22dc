"""Where the answers of a rendered conversation begin and end, in tokens."""

import datetime
import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

from qlora_train.data.chat import encode_marked_chat, render_chat
from qlora_train.data.types import Message, UnusableRowError

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Rendering:
    """A text and its tokens: `input_ids` (seq,) and the characters [begin, end) that each of them stands for."""

    text: str
    input_ids: list[int]
    offsets: list[tuple[int, int]]

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> Self:
        """Tokenise `text` without adding anything: a rendered conversation has its special tokens already.

        `verbose=False` silences a warning about the tokenizer's own idea of a maximum; `data.max_length` decides.
        """
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return cls(text, encoded["input_ids"], encoded["offset_mapping"])


def has_generation_block(tokenizer: Any) -> bool:
    """Say whether the chat template marks its answers with ``{% generation %}``."""
    return bool(GENERATION_BLOCK.search(tokenizer.get_chat_template()))


def first_token_after(rendering: Rendering, position: int) -> int:
    """Return the index of the first token with a character at or after `position`; (seq,) if there is none."""
    return bisect_right(rendering.offsets, position, key=lambda offset: offset[1])


def answer_starts(
    tokenizer: Any,
    turns: Sequence[Message],
    answers: Sequence[int],
    whole: Rendering,
    *,
    date: datetime.date,
    has_block: bool,
) -> tuple[list[int], list[list[int]]]:
    """Return the first token of each answer, and the tokens of its prompt as inference would send them.

    Args:
        tokenizer: renders and tokenises.
        turns: the conversation.
        answers: indices of the assistant turns that are asked for.
        whole: the whole conversation, rendered for the same date.
        date: the day that prompts are rendered for.
        has_block: whether the template marks its answers itself.

    Raises:
        UnusableRowError: the template renders a prompt that the whole conversation does not begin with.
    """
    if not answers:
        return [], []
    texts = [render_chat(tokenizer, turns[:answer], date=date, add_generation_prompt=True) for answer in answers]
    prompts = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if has_block:
        marked = _marked_starts(tokenizer, turns, whole, date)
        return [marked[answer] for answer in answers], prompts
    for text in texts:
        if not whole.text.startswith(text):
            raise UnusableRowError(
                "the chat template renders the prompt of an answer differently with the answer behind it (it drops or "
                "rewrites earlier turns)"
            )
    return [first_token_after(whole, len(text)) for text in texts], prompts


def _marked_starts(tokenizer: Any, turns: Sequence[Message], whole: Rendering, date: datetime.date) -> dict[int, int]:
    """Map each assistant turn to the first token of its ``{% generation %}`` block."""
    input_ids, mask = encode_marked_chat(tokenizer, turns, date=date)
    assert input_ids == whole.input_ids, "the template renders differently when it marks its answers"
    starts = [i for i, marked in enumerate(mask) if marked and (i == 0 or not mask[i - 1])]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(starts) != len(answers):
        raise UnusableRowError(
            f"the chat template marks {len(starts)} answers with its generation block, the row has {len(answers)}"
        )
    return dict(zip(answers, starts, strict=True))


def end_of_turn(whole: Rendering, start: int, content: str, special_ids: Collection[int]) -> int:
    """Return the index of the special token that ends the answer beginning at token `start`.

    Raises:
        UnusableRowError: there is none, or the answer's text does not stand between `start` and it.
    """
    end = next((i for i in range(start, len(whole.input_ids)) if whole.input_ids[i] in special_ids), None)
    if end is None:
        raise UnusableRowError(
            "the chat template ends an assistant turn without a special token, so no end can be learnt"
        )
    answer = whole.text[whole.offsets[start][0] : whole.offsets[end][0]]
    if "".join(content.split()) not in "".join(answer.split()):
        raise UnusableRowError(
            "the chat template leaves out or rewrites part of an assistant turn (reasoning of earlier turns?); "
            "data.loss_on: last looks at the last turn only"
        )
    return end
