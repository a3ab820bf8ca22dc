"""A conversation -> text or tokens by the tokenizer's own chat template, the same on every day.

Some templates (Llama 3, SmolLM3, gpt-oss) write today's date by calling `strftime_now`. Rendered on two days they give
two data sets, so a run could not be resumed tomorrow. Here the caller passes the date.

Transformers offers `strftime_now` as a global of its Jinja environment and turns every callable that is passed as a
template variable into a string, so an argument cannot replace it. A macro of the same name in front of the template can:
a name that a template defines wins over a global.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from qlora_train.data.types import Message, UnusableRowError

CLOCK = "strftime_now"
DIRECTIVES = tuple("aAbBcCdDeFgGhHIjmMnpRStTuUVwWxXyYzZf") + tuple(f"-{letter}" for letter in "dHIjmMSy")
"""Letters that may follow % in a date format: Python's, those that glibc and macOS share, and ``%-d``."""
ASKS_FOR_NULL = re.compile(r"content['\"\]]*\s+(?:is|==)\s+none", re.IGNORECASE)
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PYTHON_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError)
"""A template is code too: ``"a" + 1`` in it raises what Python raises."""


@dataclass(frozen=True, slots=True)
class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Attributes:
        tokenizer: a Transformers tokenizer with a chat template.
        date: what a template that asks for the current date gets; its time is midnight.
        tools: JSON schemas of the functions that the assistant may call.
        chat_template_kwargs: more variables for the template, such as `enable_thinking`.
        text_arguments: pass the arguments of tool calls as JSON text instead of objects.
    """

    tokenizer: Any
    date: datetime.date
    tools: Sequence[Mapping[str, Any]] = ()
    chat_template_kwargs: Mapping[str, Any] | None = None
    text_arguments: bool = False

    @property
    def template(self) -> str:
        """The Jinja text; a tokenizer may have one for rows with tools and another for rows without."""
        text: str = self.tokenizer.get_chat_template(tools=list(self.tools) or None)
        return text

    def text(self, turns: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return a conversation, at least one turn, as the text that the model sees.

        Raises:
            jinja2.exceptions.TemplateError: the template refuses the conversation.
        """
        return self._render(turns, add_generation_prompt=add_generation_prompt)[0]

    def generation_blocks(self, turns: Sequence[Message]) -> list[tuple[int, int]] | None:
        """Return the characters [begin, end) in ``{% generation %}`` blocks; None for a template without them."""
        if not GENERATION_BLOCK.search(self.template):
            return None
        return self._render(turns, return_assistant_tokens_mask=True)[1]

    def _render(self, turns: Sequence[Message], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            template = _with_clock(self.template, self.date)
            messages = _with_null_contents(with_text_arguments(turns) if self.text_arguments else turns, template)
            options |= {"tools": list(self.tools) or None, "chat_template": template}
            options |= self.chat_template_kwargs or {}
            has_null = any(message["content"] is None for message in messages)
            if not has_null and "return_assistant_tokens_mask" not in options:
                return self.tokenizer.apply_chat_template(messages, tokenize=False, **options), []
            # apply_chat_template drops fields that hold null, and gives no blocks without tokens
            variables = {**self.tokenizer.special_tokens_map, **options}
            texts, blocks = render_jinja_template(conversations=[messages], **variables)
        except PYTHON_ERRORS as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from None
        return texts[0], [(begin, end) for begin, end in blocks[0]] if blocks else []


def _with_null_contents(turns: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """Replace empty content beside tool calls by null, as in OpenAI's messages, for templates that test for null.

    Some templates write calls only there, and others fail on null.
    """
    if not ASKS_FOR_NULL.search(template):
        return [dict(turn) for turn in turns]
    return [{**turn, "content": None} if "tool_calls" in turn and not turn["content"] else dict(turn) for turn in turns]


def render_chat(
    tokenizer: Any, turns: Sequence[Message], *, date: datetime.date, add_generation_prompt: bool = False
) -> str:
    """Return a conversation without tools as text; see `ChatRenderer.text`."""
    return ChatRenderer(tokenizer, date).text(turns, add_generation_prompt=add_generation_prompt)


def encode_chat(
    tokenizer: Any, turns: Sequence[Message], *, date: datetime.date, add_generation_prompt: bool = False
) -> list[int]:
    """Return the tokens of `render_chat`, (seq,): exactly those of training, without a second bos token."""
    text = render_chat(tokenizer, turns, date=date, add_generation_prompt=add_generation_prompt)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def is_dated(tokenizer: Any) -> bool:
    """Return whether the chat template, if there is one, asks for the current date."""
    return CLOCK in str(tokenizer.chat_template)


@functools.lru_cache(maxsize=32)
def _with_clock(template: str, date: datetime.date) -> str:
    return _clock(date) + template if CLOCK in template else template


def _clock(date: datetime.date) -> str:
    """Return a Jinja macro that formats `date` like strftime and refuses unknown directives.

    It ends with a newline that Jinja removes: the template must still begin at the start of a line, where Jinja treats
    white space differently.
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


def with_text_arguments(turns: Sequence[Message]) -> list[Message]:
    """Return turns whose calls have their arguments as JSON text, for chat templates that concatenate them."""
    return [
        {**turn, "tool_calls": [_with_text_arguments(call) for call in turn["tool_calls"]]}
        if "tool_calls" in turn
        else turn
        for turn in turns
    ]


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": as_json(function["arguments"])}}


def refuse_misread_arguments(turns: Sequence[Message], text: str, *, text_arguments: bool) -> None:
    """Raise UnusableRowError if a chat template wrote objects in Python's notation, or JSON text as a JSON string."""
    for arguments in (call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", [])):
        right = as_json(arguments)
        wrong = {as_json(right), repr(right)} if text_arguments else {str(arguments)} - {right}
        if any(form in text for form in wrong):
            raise UnusableRowError("the chat template does not write the arguments of a call as JSON")


def as_json(value: Any) -> str:
    """Return JSON as the `tojson` of chat templates writes it."""
    return json.dumps(value, ensure_ascii=False)
