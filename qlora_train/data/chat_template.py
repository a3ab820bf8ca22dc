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
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from qlora_train.data.types import Message

CLOCK = "strftime_now"
DIRECTIVES = tuple("aAbBcCdDeFgGhHIjmMnpRStTuUVwWxXyYzZf") + tuple(f"-{letter}" for letter in "dHIjmMSy")
"""Letters that may follow % in the format of a date: Python's, those that glibc and macOS share, and ``%-d``."""

ASKS_FOR_NULL = re.compile(r"content['\"\]]*\s+(?:is|==)\s+none", re.IGNORECASE)
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def render_chat(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    *,
    date: datetime.date,
    tools: Sequence[Mapping[str, Any]] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Return a conversation as the text that the model sees.

    Args:
        tokenizer: a Transformers tokenizer with a chat template.
        turns: at least one.
        date: what a template that asks for the current date is told; its time is midnight.
        tools: JSON schemas of the functions that the assistant may call.
        chat_template_kwargs: more variables for the template, such as `enable_thinking`.
        add_generation_prompt: end with what stands before an answer.

    Raises:
        jinja2.exceptions.TemplateError: the template refuses the conversation.
    """
    try:
        template = dated_template(tokenizer, date, tools)
        read = as_template_reads(turns, template)
        options = {
            "tools": list(tools) or None,
            "chat_template": template,
            "add_generation_prompt": add_generation_prompt,
            **(chat_template_kwargs or {}),
        }
        if any(turn["content"] is None for turn in read):  # apply_chat_template drops fields that hold null
            text, _ = _render(tokenizer, read, **options)
        else:
            text = tokenizer.apply_chat_template(read, tokenize=False, **options)
    except PYTHON_ERRORS as error:
        raise _as_template_error(error) from None
    return text


def _render(tokenizer: Any, turns: list[dict[str, Any]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return the text and the characters of its generation blocks, if `return_assistant_tokens_mask` asks for them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, blocks = render_jinja_template(conversations=[turns], **{**tokenizer.special_tokens_map, **options})
    return texts[0], [(begin, end) for begin, end in blocks[0]] if blocks else []


def encode_chat(
    tokenizer: Any, turns: Sequence[Message], *, date: datetime.date, add_generation_prompt: bool = False
) -> list[int]:
    """Return the tokens of `render_chat`, shape (seq,): exactly those of training, without a second bos token."""
    text = render_chat(tokenizer, turns, date=date, add_generation_prompt=add_generation_prompt)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def has_generation_block(tokenizer: Any, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Say whether the chat template marks its answers with ``{% generation %}``."""
    return bool(GENERATION_BLOCK.search(tokenizer.get_chat_template(tools=list(tools) or None)))


def generation_blocks(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    *,
    date: datetime.date,
    tools: Sequence[Mapping[str, Any]] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[tuple[int, int]]:
    """Return the characters [begin, end) of `render_chat` that stand in ``{% generation %}`` blocks, in order.

    Raises:
        jinja2.exceptions.TemplateError: the template refuses the conversation.
    """
    try:
        template = dated_template(tokenizer, date, tools)
        read, functions = as_template_reads(turns, template), list(tools) or None
        _, blocks = _render(
            tokenizer, read, tools=functions, chat_template=template, return_assistant_tokens_mask=True,
            **(chat_template_kwargs or {}),
        )  # fmt: skip
    except PYTHON_ERRORS as error:
        raise _as_template_error(error) from None
    return blocks


def as_template_reads(turns: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return turns with null for no content beside calls, as OpenAI's messages have it, where the template asks for null.

    Some templates write calls only there, and others fail on null.
    """
    if not ASKS_FOR_NULL.search(template):
        return [dict(turn) for turn in turns]
    return [{**turn, "content": None} if "tool_calls" in turn and not turn["content"] else dict(turn) for turn in turns]


PYTHON_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError)
"""A template is code too: ``"a" + 1`` in it raises what Python raises."""


def _as_template_error(error: Exception) -> TemplateError:
    return TemplateError(f"{type(error).__name__}: {error}")


def is_dated(tokenizer: Any) -> bool:
    """Say whether the chat template, if there is one, asks for the current date."""
    return CLOCK in str(tokenizer.chat_template)


def dated_template(tokenizer: Any, date: datetime.date, tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the tokenizer's chat template, reading `date` from its clock; unchanged where it reads none.

    A tokenizer may have one template for rows with tools and another for rows without.
    """
    return _with_clock(tokenizer.get_chat_template(tools=list(tools) or None), date)


@functools.lru_cache(maxsize=32)
def _with_clock(template: str, date: datetime.date) -> str:
    return _clock(date) + template if CLOCK in template else template


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
