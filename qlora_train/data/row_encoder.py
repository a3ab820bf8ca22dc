"""Rows -> Examples: the tokens that the model sees, and which of them are labels.

A conversation is rendered once by the tokenizer's own chat template and tokenised once, so its tokens are those of
inference. The labels of an answer begin where the generation prompt of the turns before it ends, and end with the special
token that ends the turn: without it among the labels a model never learns to stop. What this relies on is checked for
every row, and a row that fails is refused with the reason:

- the text of the prompt, generation prompt included, is a prefix of the whole text, otherwise training and inference
  would differ (`answer_spans`; `template_layout` shows it without rendering every prompt);
- the row's texts hold no special token of the tokenizer, which would end a turn early (`special_tokens`);
- the answer's tokens hold the whole answer: a template that strips reasoning from earlier turns loses part of it
  (`masking`);
- system and user turns, tools, calls and their results are in the text: some templates leave them out.

A template with ``{% generation %}`` marks where answers begin, which counts as far as it is behind the prompt. Plain text
(`text`, and `prompt_completion` of strings) gets no template, but the beginning token if the tokenizer adds one, and the
end-of-sequence token, which is a label; a `prompt` has no labels, unless `train_on` is `all`. A row of tokens stays as it
is.
"""

import datetime
import functools
import logging
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from jinja2.exceptions import TemplateError

from qlora_train.data.answer_spans import AnswerSpan, find_answers, refuse_lost_turns
from qlora_train.data.chat_template import ChatRenderer, as_json, refuse_misread_arguments
from qlora_train.data.default_chat_templates import CHAT_TEMPLATES
from qlora_train.data.masking import TokenizedText, answer_tokens, refuse_lost_tools, tokenize
from qlora_train.data.reasoning import with_reasoning
from qlora_train.data.special_tokens import SpecialTokens
from qlora_train.data.template_layout import MOST_KEPT, LayoutCache, initials_of
from qlora_train.data.types import Example, MaskArray, Message, Row, UnusableRowError
from qlora_train.utils.errors import DataError

log = logging.getLogger("qlora_train")

PROBE: tuple[Message, ...] = ({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})
PROBE_WITH_REASONING: tuple[Message, ...] = (PROBE[0], {**PROBE[1], "reasoning_content": "three"})
INLINE_REASONING = "<think>...</think> at the start of an answer is read as its reasoning_content"
"""Warning: a template with its own way to write reasoning would write an empty think block before this one."""
CROSSES_PROMPT_END = "one token spans the end of the prompt and the start of the answer"
"""Warning: the prompt's tokens there are not those of inference; a token of both counts as the answer's."""
TWO_BOS = "the row begins with the tokenizer's beginning token twice"


class RowEncoder:
    """Turns rows into examples with one tokenizer.

    Args:
        tokenizer: a fast tokenizer; slow ones give no character offsets.
        train_on: `data.train_on`.
        date: the day that a chat template with a date is rendered for.

    Raises:
        DataError: the tokenizer has no offsets or no end-of-sequence token.
    """

    def __init__(
        self, tokenizer: Any, *, train_on: Literal["assistant", "last", "completion", "all"], date: datetime.date
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets, which the loss mask needs; "
                "expected a fast tokenizer: save one beside the model (tokenizer.json)"
            )
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        self._special = SpecialTokens(tokenizer)
        self._tokenizer, self._train_on, self._date = tokenizer, train_on, date
        self._layouts: LayoutCache | None = None
        self._confirmed_layouts: set[str] = set()
        self._has_logged_text_arguments = False
        # most prompts end in the same few ways
        self._tokens_of_prompt_end = functools.lru_cache(1024)(lambda text: tokenize(tokenizer, text).ids)
        self._writes_reasoning: dict[str, bool] = {}

    def encode(self, row: Row) -> Example:
        """Return the row as tokens and mask, each of shape (seq,).

        Raises:
            UnusableRowError: the row cannot be rendered, or has no label.
            DataError: the tokenizer has no chat template, or one that no row can be masked with.
        """
        if row.messages is not None:
            example = self._conversation(row, row.messages)
        elif row.input_ids is not None:
            example = self._tokens(row, row.input_ids)
        else:
            assert row.text is not None
            example = self._plain(row, row.text)
        example.loss_mask[:1] = False
        if not example.loss_mask.any():
            raise UnusableRowError("no trained token")
        return example

    def _tokens(self, row: Row, input_ids: Sequence[int]) -> Example:
        mask = np.ones(len(input_ids), np.bool_) if row.loss_mask is None else np.array(row.loss_mask, np.bool_)
        warnings = (TWO_BOS,) if self._special.starts_with_two_bos(input_ids) else ()
        return Example(row.where, np.array(input_ids, np.int32), mask, warnings=warnings)

    def _plain(self, row: Row, text: str) -> Example:
        prompt = row.prompt or ""
        whole = TokenizedText(self._tokenizer, self._special, prompt + text)
        num_prompt = whole.first_token_from(len(prompt))
        warnings = self._crossing(whole, [len(prompt)] if prompt else [])
        ids = whole.ids
        while self._special.starts_with_two_bos(ids):
            ids = ids[1:]
        ids = self._special.bos_for(ids) + ids
        num_untrained = 0 if self._train_on == "all" or not prompt else num_prompt + len(ids) - len(whole.ids)
        if ids[-1:] != [self._special.eos]:
            ids = [*ids, self._special.eos]
        mask = np.ones(len(ids), np.bool_)
        mask[: max(num_untrained, 0)] = False
        input_ids = np.array(ids, np.int32)
        if not prompt:
            return Example(row.where, input_ids, mask, warnings=warnings)
        return Example(row.where, input_ids, mask, prompt, text, warnings)

    def _conversation(self, row: Row, messages: tuple[Message, ...]) -> Example:
        """Render with the arguments of tool calls as objects and, if that fails, as JSON text."""
        layouts = self._checked_layouts()
        chat = ChatRenderer(self._tokenizer, self._date, row.tools, row.chat_template_kwargs)
        turns = tuple(map(with_reasoning, messages)) if self._reads_reasoning(chat) else messages
        self._special.refuse_in_turns(turns, row.tools)
        try:
            return self._encoded(row, turns, chat, layouts)
        except UnusableRowError as error:
            if not any("tool_calls" in turn for turn in turns):
                raise
            try:
                example = self._encoded(row, turns, replace(chat, text_arguments=True), layouts)
            except UnusableRowError:
                raise error from None
            if not self._has_logged_text_arguments:
                self._has_logged_text_arguments = True
                log.debug("chat template: gets the arguments of calls as JSON text (with objects: %s)", error.reason)
            return example

    def _encoded(self, row: Row, turns: tuple[Message, ...], chat: ChatRenderer, layouts: LayoutCache) -> Example:
        trained, located = self._answers(row, turns)
        try:
            whole, spans = self._spans(turns, located, chat, layouts)
            without_tools = replace(chat, tools=()).text(turns) if row.tools else whole.text
        except TemplateError as error:
            raise UnusableRowError(f"the chat template refuses the row: {error.message}") from None
        if row.tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
            refuse_lost_tools(whole.text, without_tools, turns, row.tools)
            refuse_misread_arguments(turns, whole.text, text_arguments=chat.text_arguments)
        tokens = {i: answer_tokens(whole, spans[i], turns[i]) for i in located}
        mask = self._mask(len(whole.ids), tokens, trained)
        warnings = self._crossing(whole, [spans[i].prompt_end for i in trained])
        if row.chat_template_kwargs:
            warnings += _kwargs_warning(chat, turns, whole.text)
        assert row.messages is not None
        if turns != row.messages:
            warnings += (INLINE_REASONING,)
        if row.tools or row.chat_template_kwargs or turns[-1].get("tool_calls") or chat.text_arguments:
            return Example(row.where, whole.input_ids, mask, warnings=warnings)
        return Example(row.where, whole.input_ids, mask, turns[:-1], row.messages[-1]["content"], warnings)

    def _answers(self, row: Row, turns: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Return the indices of the assistant turns to train on, and of all that must be located for the mask."""
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= row.loss_from]
        if self._train_on == "last":
            answers = answers[-1:]
        trained = [i for i in answers if i not in row.untrained]
        return trained, answers if self._train_on in ("completion", "all") else trained

    def _mask(self, length: int, answers: Mapping[int, tuple[int, int]], trained: Sequence[int]) -> MaskArray:
        mask = np.zeros(length, np.bool_)
        if self._train_on == "all":
            mask[:] = True
        elif self._train_on == "completion" and answers:
            mask[min(first for first, _ in answers.values()) :] = True
        for index, (first, last) in answers.items():
            mask[first : last + 1] = index in trained
        return mask

    def _spans(
        self, turns: Sequence[Message], located: Sequence[int], chat: ChatRenderer, layouts: LayoutCache
    ) -> tuple[TokenizedText, Mapping[int, AnswerSpan]]:
        """Return the conversation as text and tokens, and the spans of the answers `located`, perhaps of others too."""
        text = chat.text(turns)
        whole = TokenizedText(self._tokenizer, self._special, text)
        layout = None if chat.tools or chat.chat_template_kwargs else layouts.get(turns)
        spans = layout.find_answers(turns, text) if layout else None
        roles = initials_of(turns)
        if spans is not None and roles not in self._confirmed_layouts:
            if self._is_confirmed(chat, turns, whole, spans):
                if len(self._confirmed_layouts) >= MOST_KEPT:
                    self._confirmed_layouts.clear()
                self._confirmed_layouts.add(roles)
            else:
                layouts.reject(roles)
                spans = None
        if spans is None:
            refuse_lost_turns(chat, turns)
            spans = find_answers(chat, turns, text, located)
        return whole, spans

    def _is_confirmed(
        self, chat: ChatRenderer, turns: Sequence[Message], whole: TokenizedText, spans: Mapping[int, AnswerSpan]
    ) -> bool:
        """Return whether the layout's spans of the last answer and one before it are those of their prompts."""
        answers = list(spans)
        chosen = sorted({answers[len(answers) // 2 - 1], answers[-1]})

        def begin_and_tokens(span: AnswerSpan, index: int) -> tuple[int, int, tuple[int, int]]:
            return span.prompt_end, span.begin, answer_tokens(whole, span, turns[index])

        try:
            defined = find_answers(chat, turns, whole.text, chosen)
            return all(begin_and_tokens(defined[i], i) == begin_and_tokens(spans[i], i) for i in chosen)
        except (TemplateError, UnusableRowError):
            return False

    def _crossing(self, whole: TokenizedText, prompt_ends: Iterable[int]) -> tuple[str, ...]:
        """Return a warning if the tokens of a prompt alone differ from those of its text here."""
        crosses = any(self._crosses(whole, prompt_end) for prompt_end in prompt_ends)
        return (CROSSES_PROMPT_END,) if crosses else ()

    def _crosses(self, whole: TokenizedText, prompt_end: int) -> bool:
        """Compare from the prompt's last special token on, since the tokens before it are the same; else the whole."""
        first = whole.first_token_from(prompt_end)
        number = bisect_left(whole.special, first) - 1
        from_token = whole.special[number] if number >= 0 else 0
        from_char = whole.chars_of(from_token)[0] if number >= 0 else 0
        if self._tokens_of_prompt_end(whole.text[from_char:prompt_end]) == whole.ids[from_token:first]:
            return False
        return from_char == 0 or tokenize(self._tokenizer, whole.text[:prompt_end]).ids != whole.ids[:first]

    def _reads_reasoning(self, chat: ChatRenderer) -> bool:
        """Return whether the chat template writes the `reasoning_content` of an answer."""
        template = chat.template
        if template not in self._writes_reasoning:
            try:
                text = replace(chat, chat_template_kwargs=None).text(PROBE_WITH_REASONING)
            except TemplateError:
                text = ""
            self._writes_reasoning[template] = PROBE_WITH_REASONING[1]["reasoning_content"] in text
        return self._writes_reasoning[template]

    def _checked_layouts(self) -> LayoutCache:
        """Render a short conversation, once: what fails here, with and without reasoning, would fail for every row."""
        if self._layouts is not None:
            return self._layouts
        names = ", ".join(CHAT_TEMPLATES)
        if not self._tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, which conversations need; set model.chat_template to "
                f"{names} or a Jinja file"
            )
        chat = ChatRenderer(self._tokenizer, self._date)
        try:
            ids = self._probed(chat, PROBE)
        except (TemplateError, UnusableRowError) as error:
            try:
                ids = self._probed(chat, PROBE_WITH_REASONING)
            except (TemplateError, UnusableRowError):
                raise DataError(
                    "the tokenizer's chat template cannot be trained with: a user and an assistant turn failed: "
                    f"{error}; set model.chat_template to {names} or a corrected Jinja file"
                ) from None
        if self._special.starts_with_two_bos(ids):
            raise DataError(
                "the tokenizer's chat template writes the beginning token twice; set model.chat_template to a corrected "
                "Jinja file"
            )
        self._layouts = LayoutCache(chat)
        return self._layouts

    def _probed(self, chat: ChatRenderer, turns: Sequence[Message]) -> list[int]:
        whole = TokenizedText(self._tokenizer, self._special, chat.text(turns))
        span = find_answers(chat, turns, whole.text, [1])[1]
        answer_tokens(whole, span, turns[1])
        return whole.ids


def _kwargs_warning(chat: ChatRenderer, turns: Sequence[Message], text: str) -> tuple[str, ...]:
    """Return a warning if the row's own variables change its text."""
    try:
        if replace(chat, chat_template_kwargs=None).text(turns) == text:
            return ()
    except TemplateError:
        pass  # the template needs them
    return (f"rendered with chat_template_kwargs {as_json(chat.chat_template_kwargs)}, which inference must pass too",)
