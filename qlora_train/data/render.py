"""Rows -> Examples: the tokens a model will see, and which of them carry loss.

A conversation is rendered once by the tokenizer's own chat template and tokenised once, so that the tokens are those of
inference. An answer's tokens begin where the *generation prompt* of the turns before it ends and end with the special
token that ends the turn: without it in the loss a model never learns to stop. Everything that this rests on is checked,
and a row that fails is refused with the reason:

- the text of the prompt, generation prompt included, is a prefix of the whole text, otherwise training and inference
  would differ (`skeleton` says how this is known without rendering every prompt);
- nothing that a row says holds a special token of the tokenizer's, which would end a turn early;
- the answer's tokens hold what the row says there: a template that strips reasoning from earlier turns loses part of it;
- system and user turns, functions, calls and what they returned stand in the text: some templates leave them out.

A template with ``{% generation %}`` says itself where answers begin, and is believed as far as that is behind the
prompt. Plain text (`text`, and `prompt_completion` of strings) is no conversation: it gets the beginning token if the
tokenizer adds one, no template, and the end-of-sequence token, which carries loss; only a `prompt` carries none, unless
`train_on` is `all`. A row of tokens is taken as it is.
"""

import datetime
import logging
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jinja2.exceptions import TemplateError

from qlora_train.data.chat_template import generation_blocks, has_generation_block, render_chat
from qlora_train.data.default_chat_templates import CHAT_TEMPLATES
from qlora_train.data.masking import AnswerPlace, TokenizedText, answer_span, refuse_lost, tokenize
from qlora_train.data.reasoning import with_reasoning
from qlora_train.data.special_tokens import SpecialTokens
from qlora_train.data.template_layout import Skeletons, places_by_prompts
from qlora_train.data.tool_calls import as_json, refuse_misread_arguments, with_text_arguments
from qlora_train.data.types import Example, MaskArray, Message, Row, UnusableRowError
from qlora_train.utils.errors import DataError

log = logging.getLogger("qlora_train")

PROBE: tuple[Message, ...] = ({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})
PROBE_WITH_REASONING: tuple[Message, ...] = (PROBE[0], {**PROBE[1], "reasoning_content": "three"})
INLINE_REASONING = "<think>...</think> at the start of an answer is read as its reasoning_content"
"""Note: the chat template has its own way to write reasoning, and would write empty thoughts before these."""
REACHES_OVER = "a token reaches over the border of prompt and answer"
"""Note: the tokens of the prompt are not those of inference there; a token of both counts as the answer's."""
TWO_BEGINNINGS = "the row begins with the tokenizer's beginning token twice"
"""Note on a row of tokens."""
MOST_TAILS = 1024
"""Ends of prompts whose tokens are kept."""


@dataclass(frozen=True, slots=True)
class TokenizerChat:
    """The chat template of a tokenizer for one date, one list of tools and one set of variables; see `skeleton.Chat`."""

    tokenizer: Any
    date: datetime.date
    tools: Sequence[Mapping[str, Any]] = ()
    chat_template_kwargs: Mapping[str, Any] | None = None
    text_arguments: bool = False

    def text(self, turns: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return a conversation as text."""
        return render_chat(
            self.tokenizer, self._shaped(turns), date=self.date, tools=self.tools,
            chat_template_kwargs=self.chat_template_kwargs, add_generation_prompt=add_generation_prompt,
        )  # fmt: skip

    def blocks(self, turns: Sequence[Message]) -> list[tuple[int, int]] | None:
        """Return the characters in generation blocks; None for a template without them."""
        if not has_generation_block(self.tokenizer, self.tools):
            return None
        return generation_blocks(
            self.tokenizer, self._shaped(turns), date=self.date, tools=self.tools,
            chat_template_kwargs=self.chat_template_kwargs,
        )  # fmt: skip

    def _shaped(self, turns: Sequence[Message]) -> Sequence[Message]:
        return with_text_arguments(turns) if self.text_arguments else turns


class Renderer:
    """Turns rows into examples with one tokenizer.

    Args:
        tokenizer: a fast tokenizer; slow ones do not say which characters a token stands for.
        train_on: `data.train_on`.
        date: the day that a chat template with a date is rendered for.

    Attributes:
        special: the tokenizer's special tokens.

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
        self.special = SpecialTokens(tokenizer)
        self._tokenizer, self._train_on, self._date = tokenizer, train_on, date
        self._tails: dict[str, list[int]] = {}
        self._is_reasoning: dict[str, bool] = {}
        self._skeletons: Skeletons | None = None
        self._has_text_arguments = False

    def render(self, row: Row) -> Example:
        """Return the row as tokens and mask, each of shape (seq,).

        Raises:
            UnusableRowError: the row cannot be rendered, or has no token to learn.
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
        warnings = (TWO_BEGINNINGS,) if self.special.begins_twice(input_ids) else ()
        return Example(row.where, np.array(input_ids, np.int32), mask, warnings=warnings)

    def _plain(self, row: Row, text: str) -> Example:
        prompt = row.prompt or ""
        whole = TokenizedText(self._tokenizer, prompt + text)
        first = whole.first_token_after(len(prompt))
        ends = [len(prompt)] if prompt else []
        warnings = self._notes(whole, ends, self.special.places_in(whole.input_ids))
        ids = self._begun(whole.ids)
        num_prompt = 0 if self._train_on == "all" or not prompt else max(len(ids) - len(whole.ids) + first, 0)
        if ids[-1:] != [self.special.eos]:
            ids.append(self.special.eos)
        mask = np.ones(len(ids), np.bool_)
        mask[:num_prompt] = False
        input_ids = np.array(ids, np.int32)
        if not row.prompt:
            return Example(row.where, input_ids, mask, warnings=warnings)
        return Example(row.where, input_ids, mask, row.prompt, text, warnings)

    def _begun(self, ids: list[int]) -> list[int]:
        """Return the tokens of a plain text with the beginning token as the tokenizer adds it, and never twice."""
        while self.special.begins_twice(ids):
            ids = ids[1:]
        return self.special.beginning_for(ids) + ids

    def _conversation(self, row: Row, messages: tuple[Message, ...]) -> Example:
        self._check_template()
        turns = tuple(map(with_reasoning, messages)) if self._reads_reasoning(row.tools) else messages
        self.special.refuse_in_turns(turns, row.tools)
        chat = TokenizerChat(self._tokenizer, self._date, row.tools, row.chat_template_kwargs)
        try:
            return self._rendered(row, turns, chat)
        except UnusableRowError as error:
            if not any("tool_calls" in turn for turn in turns):
                raise
            try:
                example = self._rendered(row, turns, replace(chat, text_arguments=True))
            except UnusableRowError:
                raise error from None
            if not self._has_text_arguments:
                self._has_text_arguments = True
                log.info("chat template: gets the arguments of calls as JSON text (with objects: %s)", error.reason)
            return example

    def _rendered(self, row: Row, turns: tuple[Message, ...], chat: TokenizerChat) -> Example:
        learnt, wanted = self._answers(row, turns)
        try:
            whole, places = self._places(turns, wanted, chat)
            without_tools = replace(chat, tools=()).text(turns) if row.tools else whole.text
        except TemplateError as error:
            raise UnusableRowError(f"the chat template refuses the row: {error.message}") from None
        if row.tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
            refuse_lost(whole.text, without_tools, turns, row.tools)
            refuse_misread_arguments(turns, whole.text, text_arguments=chat.text_arguments)
        special = self.special.places_in(whole.input_ids)
        spans = {i: self._span(whole, places[i], turns[i], special) for i in wanted}
        mask = self._mask(len(whole.ids), spans, learnt)
        warnings = self._notes(whole, [places[i].prompt_end for i in learnt], special)
        if row.chat_template_kwargs:
            warnings += _kwargs_note(chat, turns, whole.text)
        assert row.messages is not None
        if turns != row.messages:
            warnings = (*warnings, INLINE_REASONING)
        if row.tools or row.chat_template_kwargs or turns[-1].get("tool_calls") or chat.text_arguments:
            return Example(row.where, whole.input_ids, mask, warnings=warnings)
        return Example(row.where, whole.input_ids, mask, turns[:-1], row.messages[-1]["content"], warnings)

    def _span(
        self, whole: TokenizedText, place: AnswerPlace, turn: Message, special_places: Sequence[int]
    ) -> tuple[int, int]:
        return answer_span(whole, place, turn, special_places, self.special.eos)

    def _reads_reasoning(self, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Say whether the chat template has a place for the reasoning of an answer."""
        template = self._tokenizer.get_chat_template(tools=list(tools) or None)
        if template not in self._is_reasoning:
            try:
                text = TokenizerChat(self._tokenizer, self._date, tools).text(PROBE_WITH_REASONING)
            except TemplateError:
                text = ""
            self._is_reasoning[template] = PROBE_WITH_REASONING[1]["reasoning_content"] in text
        return self._is_reasoning[template]

    def _answers(self, row: Row, turns: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Return the assistant turns to learn, and all whose places are needed."""
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= row.loss_from]
        if self._train_on == "last":
            answers = answers[-1:]
        learnt = [i for i in answers if i not in row.untrained]
        return learnt, answers if self._train_on in ("completion", "all") else learnt

    def _mask(self, length: int, spans: Mapping[int, tuple[int, int]], learnt: Sequence[int]) -> MaskArray:
        mask = np.zeros(length, np.bool_)
        if self._train_on == "all":
            mask[:] = True
        elif self._train_on == "completion" and spans:
            mask[min(start for start, _ in spans.values()) :] = True
        for index, (start, end) in spans.items():
            mask[start : end + 1] = index in learnt
        return mask

    def _places(
        self, turns: Sequence[Message], wanted: Sequence[int], chat: TokenizerChat
    ) -> tuple[TokenizedText, Mapping[int, AnswerPlace]]:
        """Return the conversation as text and tokens, and where the answers `wanted` stand in it."""
        assert self._skeletons is not None
        text = chat.text(turns)
        is_special = bool(chat.tools or chat.chat_template_kwargs)
        skeleton, order, is_new = (None, "", False) if is_special else self._skeletons.find(turns)
        places = skeleton.places(turns, text) if skeleton else None
        whole = TokenizedText(self._tokenizer, text)
        if places is not None and is_new:
            if self._is_confirmed(chat, turns, whole, places):
                self._skeletons.trust(order)
            else:
                self._skeletons.distrust(order)
                places = None
        if places is None:
            _refuse_lost_turns(chat, turns)
            places = places_by_prompts(chat, turns, text, wanted)
        return whole, places

    def _is_confirmed(
        self, chat: TokenizerChat, turns: Sequence[Message], whole: TokenizedText, places: Mapping[int, AnswerPlace]
    ) -> bool:
        """Say whether the last answer and one before it stand where their own prompts say."""
        answers = list(places)
        chosen = sorted({answers[len(answers) // 2 - 1], answers[-1]})
        special = self.special.places_in(whole.input_ids)
        try:
            others = places_by_prompts(chat, turns, whole.text, chosen)
            return all(
                (others[i].prompt_end, others[i].begin) == (places[i].prompt_end, places[i].begin)
                and self._span(whole, others[i], turns[i], special) == self._span(whole, places[i], turns[i], special)
                for i in chosen
            )
        except (TemplateError, UnusableRowError):
            return False

    def _notes(self, whole: TokenizedText, prompt_ends: Iterable[int], special: Sequence[int]) -> tuple[str, ...]:
        """Return a note if a prompt alone has other tokens than it has here, with an answer behind it."""
        return (REACHES_OVER,) if any(self._reaches_over(whole, end, special) for end in prompt_ends) else ()

    def _reaches_over(self, whole: TokenizedText, prompt_end: int, special: Sequence[int]) -> bool:
        """Compare the tokens of a prompt from its last special token on: what stands before that one is the same."""
        first = whole.first_token_after(prompt_end)
        number = bisect_left(special, first) - 1
        from_token = special[number] if number >= 0 else 0
        from_char = whole.chars_of(from_token)[0] if number >= 0 else 0
        if self._encoded(whole.text[from_char:prompt_end]) == whole.ids[from_token:first]:
            return False
        return from_char == 0 or tokenize(self._tokenizer, whole.text[:prompt_end]).ids != whole.ids[:first]

    def _encoded(self, text: str) -> list[int]:
        """Return the tokens of the end of a prompt; most prompts end in the same few ways."""
        ids = self._tails.get(text)
        if ids is None:
            ids = tokenize(self._tokenizer, text).ids
            if len(self._tails) < MOST_TAILS:
                self._tails[text] = ids
        return ids

    def _check_template(self) -> None:
        """Render a short conversation, once: what fails there, with and without reasoning, would fail for every row."""
        if self._skeletons is not None:
            return
        names = ", ".join(CHAT_TEMPLATES)
        if not self._tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, which conversations need; set model.chat_template to "
                f"{names} or a Jinja file"
            )
        chat = TokenizerChat(self._tokenizer, self._date)
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
        if self.special.begins_twice(ids):
            raise DataError(
                "the tokenizer's chat template writes the beginning token twice; set model.chat_template to a corrected "
                "Jinja file"
            )
        self._skeletons = Skeletons(chat, self._tokenizer.get_chat_template())

    def _probed(self, chat: TokenizerChat, turns: Sequence[Message]) -> list[int]:
        text = chat.text(turns)
        whole = TokenizedText(self._tokenizer, text)
        place = places_by_prompts(chat, turns, text, [1])[1]
        self._span(whole, place, turns[1], self.special.places_in(whole.input_ids))
        return whole.ids


def _kwargs_note(chat: TokenizerChat, turns: Sequence[Message], text: str) -> tuple[str, ...]:
    """Return a note if the row's own variables change its text."""
    try:
        if replace(chat, chat_template_kwargs=None).text(turns) == text:
            return ()
    except TemplateError:
        pass  # the template needs them
    return (f"rendered with chat_template_kwargs {as_json(chat.chat_template_kwargs)}, which inference must pass too",)


def _refuse_lost_turns(chat: TokenizerChat, turns: Sequence[Message]) -> None:
    """Refuse a row of which the template leaves out a system or user turn: a mark in each must be in the text."""
    marks = {
        index: f"\ue000{index}\ue001"
        for index, turn in enumerate(turns)
        if turn["role"] in ("system", "user") and turn["content"].strip()
    }
    marked: list[Message] = [{**turn, "content": turn["content"] + marks.get(i, "")} for i, turn in enumerate(turns)]
    text = chat.text(marked)
    lost = {turns[index]["role"] for index, mark in marks.items() if mark not in text}
    if "system" in lost:
        raise UnusableRowError(
            "the chat template leaves out the system turn; set model.chat_template to one that writes it, or move its text "
            "into the first user turn"
        )
    if lost:
        raise UnusableRowError(
            "the chat template leaves out a user turn; set model.chat_template to one that writes it"
        )
