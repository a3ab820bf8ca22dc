"""Rows -> Examples: the tokens a model will see, and which of them carry loss.

A conversation is rendered once by the tokenizer's own chat template and tokenised once, so that the tokens are those of
inference. An answer's tokens begin where the *generation prompt* of the turns before it ends (`masks.answer_starts`)
and end with the first special token after that, the end-of-turn token: without it in the loss a model never learns to
stop. Everything that this rests on is checked for every row, and a row that fails is refused with the reason:

- the text of the generation prompt is a prefix of the whole text, otherwise training and inference would differ;
- no message holds a special token of the tokenizer's, which would end a turn early;
- the answer's tokens hold the answer's text: a template that strips reasoning from earlier turns loses part of it.

A template with ``{% generation %}`` says itself where answers begin, and is believed. Plain text (`text`, and
`prompt_completion` of strings) is no conversation: it gets the beginning token if the tokenizer adds one, no template,
and the end-of-sequence token, which carries loss; only a `prompt` carries none, unless `loss_on` is `all`.
"""

import datetime
from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from qlora_train.config.schema import DataSection
from qlora_train.data.chat import render_chat
from qlora_train.data.chat_templates import CHAT_TEMPLATES
from qlora_train.data.masks import Rendering, answer_starts, end_of_turn, first_token_after, has_generation_block
from qlora_train.data.special_tokens import SpecialTokens
from qlora_train.data.types import Example, Message, Prompt, Row, UnusableRowError
from qlora_train.errors import DataError

PROBE: tuple[Message, ...] = ({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})


class Renderer:
    """Turns rows into examples with one tokenizer.

    `merged_rows` names the rows in which a token reaches over the border of prompt and answer: there the tokens of the
    prompt are not those of inference, and the merged token is treated as the answer's.

    Args:
        tokenizer: a fast tokenizer; slow ones do not say which characters a token stands for.
        data: its `max_length`, `too_long` and `loss_on` are used.
        date: the day that a chat template with a date is rendered for.

    Raises:
        DataError: the tokenizer has no offsets or no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, data: DataSection, date: datetime.date) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets, which the loss mask needs; "
                "expected a fast tokenizer: save one beside the model (tokenizer.json)"
            )
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.data = data
        self.date = date
        self.special = SpecialTokens(tokenizer)
        self.merged_rows: list[str] = []
        self._has_generation_block: bool | None = None

    def render(self, row: Row) -> Example:
        """Return the row as tokens and mask, each of shape (seq,), at most `max_length` long.

        Raises:
            UnusableRowError: the row cannot be rendered, is too long, or has no token left to learn.
            DataError: the tokenizer has no chat template, or one that no row can be masked with.
        """
        if row.messages is not None:
            input_ids, loss_mask, merged = self._conversation(row.messages, row.loss_from)
            prompt: Prompt | None = row.messages[:-1]
            answer: str | None = row.messages[-1]["content"]
        else:
            assert row.text is not None
            input_ids, loss_mask, merged = self._plain(row.prompt or "", row.text)
            prompt, answer = (row.prompt, row.text) if row.prompt else (None, None)
        loss_mask[0] = False
        input_ids, loss_mask = self._fit(input_ids, loss_mask)
        if merged:
            self.merged_rows.append(row.where)
        return Example(row.where, tuple(input_ids), tuple(loss_mask), prompt, answer)

    def _fit(self, input_ids: list[int], loss_mask: list[bool]) -> tuple[list[int], list[bool]]:
        if not any(loss_mask):
            raise UnusableRowError("no trained token")
        limit = self.data.max_length
        if len(input_ids) <= limit:
            return input_ids, loss_mask
        if self.data.too_long == "drop":
            raise UnusableRowError(f"longer than data.max_length ({limit} tokens)")
        if not any(loss_mask[:limit]):
            raise UnusableRowError(f"no trained token after truncation to data.max_length ({limit} tokens)")
        return input_ids[:limit], loss_mask[:limit]

    def _plain(self, prompt: str, text: str) -> tuple[list[int], list[bool], bool]:
        whole = Rendering.of(self.tokenizer, prompt + text)
        first = first_token_after(whole, len(prompt))
        merged = _differs(Rendering.of(self.tokenizer, prompt).input_ids, whole.input_ids, first)
        begin = self.special.beginning_for(whole.input_ids)
        end = [] if whole.input_ids[-1:] == [self.special.eos] else [self.special.eos]
        input_ids = begin + whole.input_ids + end
        num_prompt = 0 if self.data.loss_on == "all" else len(begin) + first
        return input_ids, [False] * num_prompt + [True] * (len(input_ids) - num_prompt), merged

    def _conversation(self, turns: Sequence[Message], loss_from: int) -> tuple[list[int], list[bool], bool]:
        self._check_template()
        for turn in turns:
            self.special.refuse_in(turn["content"], turn["role"])
        try:
            whole = Rendering.of(self.tokenizer, self._text(turns))
            learnt = self._learnt_turns(turns, loss_from)
            starts, prompts = self._answer_starts(turns, learnt, whole)
        except TemplateError as error:
            raise UnusableRowError(f"the chat template refuses the row: {error.message}") from None
        mask = [self.data.loss_on == "all"] * len(whole.input_ids)
        for index, start in zip(learnt, starts, strict=True):
            end = end_of_turn(whole, start, turns[index]["content"], self.special.ids)
            mask[start : end + 1] = [True] * (end + 1 - start)
        merged = any(_differs(prompt, whole.input_ids, start) for start, prompt in zip(starts, prompts, strict=True))
        return whole.input_ids, mask, merged

    def _text(self, turns: Sequence[Message]) -> str:
        return render_chat(self.tokenizer, turns, date=self.date)

    def _answer_starts(
        self, turns: Sequence[Message], answers: Sequence[int], whole: Rendering
    ) -> tuple[list[int], list[list[int]]]:
        has_block = bool(self._has_generation_block)
        return answer_starts(self.tokenizer, turns, answers, whole, date=self.date, has_block=has_block)

    def _learnt_turns(self, turns: Sequence[Message], loss_from: int) -> list[int]:
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= loss_from]
        return answers[-1:] if self.data.loss_on == "last" else answers

    def _check_template(self) -> None:
        """Render a short conversation, once: what fails there would fail for every row."""
        if self._has_generation_block is not None:
            return
        names = ", ".join(CHAT_TEMPLATES)
        if not self.tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, which messages and alpaca rows need; set model.chat_template to "
                f"{names} or a Jinja file"
            )
        self._has_generation_block = has_generation_block(self.tokenizer)
        try:
            rendering = Rendering.of(self.tokenizer, self._text(PROBE))
            starts, _ = self._answer_starts(PROBE, [1], rendering)
            end_of_turn(rendering, starts[0], "two", self.special.ids)
        except (TemplateError, UnusableRowError) as error:
            raise DataError(
                f"the tokenizer's chat template cannot be trained with: a user and an assistant turn failed: {error}; "
                f"set model.chat_template to {names} or a corrected Jinja file"
            ) from None


def _differs(prompt: list[int], whole: list[int], start: int) -> bool:
    """Say whether the tokens before `start` do not begin with those of the prompt alone, as inference has them."""
    return len(prompt) > start or whole[: len(prompt)] != prompt
