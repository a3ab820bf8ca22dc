"""The text that a chat template writes around the contents of a conversation: finds its answers with one rendering.

What a template writes around the contents depends on the roles of the turns, and seldom on the contents. So each
sequence of roles is rendered once with markers as contents; the text between the markers is the *layout*. It is made
together with the prompt of each answer, which must be a prefix of the whole. A row whose text is the layout with the
row's contents filled in, to the character, needs no rendering of its prompts: the cost of a conversation grows with its
number of turns, not with its square.

The definition is `answer_spans.find_answers`. Rows that the layout does not explain use it: contents that the template
rewrites, reasoning, tool calls, and contents with a word that the template tests for (``</think>``).
`row_encoder.RowEncoder` compares the two on the first row of each sequence of roles.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
from jinja2 import nodes
from jinja2.exceptions import TemplateError

from qlora_train.data.answer_spans import AnswerSpan, common_prefix_length, first_trained
from qlora_train.data.chat_template import GENERATION_BLOCK, ChatRenderer
from qlora_train.data.reasoning import THINK_END, THINK_START
from qlora_train.data.types import Message, UnusableRowError

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
MOST_KEPT = 2048
"""Entries of a cache by sequence of roles, which is emptied then: a data set may have any number of sequences."""
MARKER = re.compile("\ue000\\d+\ue001")
END_OF_BLOCK = re.compile(r"\{%[-+]?\s*endgeneration\s*[-+]?%\}")
STRING_TESTS = frozenset(
    (
        "startswith",
        "endswith",
        "split",
        "rsplit",
        "partition",
        "rpartition",
        "find",
        "rfind",
        "index",
        "count",
        "replace",
    )
)
"""Methods with which a template searches a text for a word."""
FIELDS = frozenset(
    (
        *Message.__annotations__,
        "thinking",
        "reasoning",
        "type",
        "text",
        "function",
        "image",
        "image_url",
        "video",
        "audio",
    )
)
"""Keys of a message or of a part of its content: a template that tests for them does not search a text."""


@dataclass(frozen=True, slots=True)
class TemplateLayout:
    """The text of a chat template around the contents of one sequence of roles.

    Attributes:
        literals: the text before each content, and behind the last one: one more than there are turns.
        answers: per assistant turn, three lengths: of the literal before it, the part that belongs to its prompt and
            the part that is not trained; of the literal behind it, the part that belongs to the turn.
    """

    literals: tuple[str, ...]
    answers: Mapping[int, tuple[int, int, int]]

    def find_answers(self, turns: Sequence[Message], text: str) -> dict[int, AnswerSpan] | None:
        """Return the spans of all answers, or None if `text` is not the layout with the contents filled in."""
        spans = {}
        position = 0
        for index, (turn, before, behind) in enumerate(zip(turns, self.literals, self.literals[1:], strict=False)):
            begin = position + len(before)
            length = _written_length(text, begin, turn["content"], behind)
            if length is None or not text.startswith(before, position):
                return None
            if index in self.answers:
                prompt, untrained, ending = self.answers[index]
                end = begin + length
                spans[index] = AnswerSpan(position + prompt, position + untrained, end, end + ending)
            position = begin + length
        return spans if position + len(self.literals[-1]) == len(text) else None


def _written_length(text: str, begin: int, content: str, behind: str) -> int | None:
    """Return the length of a content at `begin`, unchanged or stripped; None if it is not there."""
    for form in (content, content.strip(), content.lstrip(), content.rstrip(), content.lstrip("\n")):
        if text.startswith(form, begin) and text.startswith(behind, begin + len(form)):
            return len(form)
    return None


class LayoutCache:
    """The layouts of one chat template for rows without tools, by the initials of the roles ("sua").

    Renderings of markers are cached, since longer conversations begin like shorter ones.
    """

    def __init__(self, chat: ChatRenderer) -> None:
        self._chat = chat
        self._layouts: dict[str, TemplateLayout | None] = {}
        self._rendered: dict[tuple[str, bool], str] = {}
        words = tested_words(chat.template)
        self._is_usable = words is not None
        self._tested_words = re.compile("|".join(map(re.escape, sorted({*(words or ()), THINK_START, THINK_END}))))

    def get(self, turns: Sequence[Message]) -> TemplateLayout | None:
        """Return the layout for a conversation; None if there is none, or if it does not hold for these contents."""
        has_fields = max(map(len, turns)) > 2  # besides role and content
        if not self._is_usable or has_fields or self._tested_words.search("\0".join(t["content"] for t in turns)):
            return None
        roles = initials_of(turns)
        if roles not in self._layouts:
            if len(self._layouts) >= MOST_KEPT:
                self._layouts.clear()
            self._layouts[roles] = self._make(roles)
        return self._layouts[roles]

    def reject(self, roles: str) -> None:
        """Use no layout for this sequence of roles from now on."""
        self._layouts[roles] = None

    def _make(self, roles: str) -> TemplateLayout | None:
        try:
            text = self._text(roles)
            blocks = self._chat.generation_blocks(_marked(roles))
            answers = {i: self._around(roles, text, i, blocks) for i, role in enumerate(roles) if role == "a"}
        except (TemplateError, UnusableRowError):
            return None
        found = {index: lengths for index, lengths in answers.items() if lengths is not None}
        is_complete = MARKER.findall(text) == [turn["content"] for turn in _marked(roles)] and len(found) == len(
            answers
        )
        return TemplateLayout(tuple(MARKER.split(text)), found) if is_complete else None

    def _around(
        self, roles: str, text: str, answer: int, blocks: Sequence[tuple[int, int]] | None
    ) -> tuple[int, int, int] | None:
        """Return an answer's entry in `TemplateLayout.answers`; None if its prompt is no prefix of the text."""
        prompt = self._text(roles[:answer], add_generation_prompt=True)
        literal_begin = text.find(_marker(answer - 1)) + len(_marker(answer - 1)) if answer else 0
        content_begin = text.find(_marker(answer))
        trained = first_trained(blocks, len(prompt))
        if not text.startswith(prompt) or not literal_begin <= len(prompt) <= trained <= content_begin:
            return None
        as_last = text if answer + 1 == len(roles) else self._text(roles[: answer + 1])
        _, marker, behind_as_last = as_last.partition(_marker(answer))
        if not marker:
            return None
        behind = text[content_begin + len(marker) :]
        return len(prompt) - literal_begin, trained - literal_begin, common_prefix_length(behind_as_last, behind)

    def _text(self, roles: str, *, add_generation_prompt: bool = False) -> str:
        key = (roles, add_generation_prompt)
        if key not in self._rendered:
            if len(self._rendered) >= MOST_KEPT:
                self._rendered.clear()
            self._rendered[key] = self._chat.text(_marked(roles), add_generation_prompt=add_generation_prompt)
        return self._rendered[key]


def initials_of(turns: Sequence[Message]) -> str:
    """Return the sequence of roles of a conversation, such as "suaua"."""
    return "".join([turn["role"][0] for turn in turns])


def _marker(index: int) -> str:
    return f"\ue000{index}\ue001"


def _marked(roles: str) -> list[Message]:
    return [{"role": ROLES[role], "content": _marker(index)} for index, role in enumerate(roles)]


def tested_words(template: str) -> frozenset[str] | None:
    """Return the words that a template searches texts for, white space aside; None if it cannot be parsed.

    A template may render a prompt differently because a message contains ``/no_think``: no layout shows that.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        tree = environment.parse(END_OF_BLOCK.sub("", GENERATION_BLOCK.sub("", template)))
    except TemplateError:
        return None
    searched: list[nodes.Node] = []
    for comparison in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in comparison.ops):
            searched.append(comparison.expr)
        elif _is_of_content(comparison):
            searched += [comparison.expr, *(operand.expr for operand in comparison.ops)]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in STRING_TESTS:
            searched.extend(call.args)
    for replacement in tree.find_all(nodes.Filter):
        if replacement.name in STRING_TESTS:
            searched.extend(replacement.args)
    names = {node.name for node in searched if isinstance(node, nodes.Name)}
    searched += [
        assignment.node
        for assignment in tree.find_all(nodes.Assign)
        if isinstance(assignment.target, nodes.Name) and assignment.target.name in names
    ]
    words = {node.value for node in searched if isinstance(node, nodes.Const) and isinstance(node.value, str)}
    return frozenset(word for word in words if word.strip() and word not in FIELDS)


def _is_of_content(comparison: nodes.Compare) -> bool:
    """Return whether a comparison concerns the content of a turn."""
    fields = [field.attr for field in comparison.find_all(nodes.Getattr)]
    keys = [const.value for const in comparison.find_all(nodes.Const)]
    names = [name.name for name in comparison.find_all(nodes.Name)]
    return "content" in (*fields, *keys, *names)
