"""A conversation -> text or tokens by the tokenizer's own chat template, the same on every day.

Some templates (Llama 3, SmolLM3, gpt-oss) write today's date by calling `strftime_now`. Rendered on two days they give
two data sets, so a run could not be resumed tomorrow. Here the caller says which day it is.

Transformers offers `strftime_now` as a global of its Jinja environment and turns every callable that is passed as a
template variable into a string, so the function cannot be replaced by an argument. A macro of the same name that
stands before the template can: a name that a template defines wins over a global.
"""

import datetime
import functools
import json
from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from qlora_train.data.types import Message

CLOCK = "strftime_now"
DIRECTIVES = tuple("aAbBcCdDeFgGhHIjmMnpRStTuUVwWxXyYzZf") + tuple(f"-{letter}" for letter in "dHIjmMSy")
"""Letters that may follow % in the format of a date: Python's, those that glibc and macOS share, and ``%-d``."""


def render_chat(
    tokenizer: Any, turns: Sequence[Message], *, date: datetime.date, add_generation_prompt: bool = False
) -> str:
    """Return a conversation as the text that the model sees.

    Args:
        tokenizer: a Transformers tokenizer with a chat template.
        turns: at least one.
        date: what a template that asks for the current date is told; its time is midnight.
        add_generation_prompt: end with what stands before an answer.

    Raises:
        jinja2.exceptions.TemplateError: the template refuses the conversation.
    """
    text: str = _apply(tokenizer, turns, date, add_generation_prompt=add_generation_prompt, tokenize=False)
    return text


def encode_chat(
    tokenizer: Any, turns: Sequence[Message], *, date: datetime.date, add_generation_prompt: bool = False
) -> list[int]:
    """Return the tokens of `render_chat`, shape (seq,): exactly those of training, without a second bos token."""
    text = render_chat(tokenizer, turns, date=date, add_generation_prompt=add_generation_prompt)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode_marked_chat(
    tokenizer: Any, turns: Sequence[Message], *, date: datetime.date
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation and which of them stand in a ``{% generation %}`` block, each (seq,)."""
    encoded = _apply(
        tokenizer, turns, date,
        return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False},
    )  # fmt: skip
    return encoded["input_ids"], [bool(marked) for marked in encoded["assistant_masks"]]


def _apply(tokenizer: Any, turns: Sequence[Message], date: datetime.date, **options: Any) -> Any:
    template = dated_template(tokenizer, date)
    try:
        return tokenizer.apply_chat_template(list(turns), chat_template=template, **options)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        # a template is code too: "a" + 1 in it raises what Python raises
        raise TemplateError(f"{type(error).__name__}: {error}") from None


def is_dated(tokenizer: Any) -> bool:
    """Say whether the chat template, if there is one, asks for the current date."""
    return bool(tokenizer.chat_template) and CLOCK in tokenizer.get_chat_template()


def dated_template(tokenizer: Any, date: datetime.date) -> str:
    """Return the tokenizer's chat template, reading `date` from its clock; unchanged where it reads none."""
    template: str = tokenizer.get_chat_template()
    return _clock(date) + template if CLOCK in template else template


@functools.lru_cache(maxsize=8)
def _clock(date: datetime.date) -> str:
    """Return a Jinja macro that formats `date` as strftime does, and refuses what it cannot format.

    Its last line ends with a newline that Jinja removes, so that the template still begins at the start of a line,
    where Jinja treats white space differently.
    """
    midnight = datetime.datetime.combine(date, datetime.time())
    replaced = "".join(
        f" | replace({json.dumps('%' + letters)}, {json.dumps(midnight.strftime('%' + letters))})"
        for letters in DIRECTIVES
    )
    return (
        "{%- macro " + CLOCK + "(format) -%}"
        "{%- set text = format | replace('%%', '\\x00')" + replaced + " -%}"
        "{%- if '%' in text -%}"
        "{{- raise_exception('strftime_now: the format ' + format + ' holds an unknown directive') -}}"
        "{%- endif -%}"
        "{{- text | replace('\\x00', '%') -}}"
        "{%- endmacro %}\n"
    )
