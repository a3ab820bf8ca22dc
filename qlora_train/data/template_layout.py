"""Where the answers of a conversation stand in its text, for the price of one rendering.

What a chat template writes around the contents depends on the roles of the turns, and seldom on what they say. So the
template's own text is learnt once for every order of roles, with marks for contents: the *skeleton*. It is learnt
together with the text that inference would send for each answer (the turns before it and the generation prompt), which
must be a prefix of the whole. A row whose text is the skeleton with the row's contents in it, to the character, then
needs no rendering of its prompts.

What the skeleton does not explain goes the long way, one rendering for each answer (`places_by_prompts`): contents that
the template rewrites, reasoning, tool calls, and contents that hold a word for which the template looks (``</think>``).
That way is the definition; `template.Renderer` compares the two on the first row of every order of roles.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.exceptions import TemplateError

from qlora_train.data.chat_template import GENERATION_BLOCK
from qlora_train.data.masking import LOST_CALL, MOST_OPENED, REWRITTEN, THOUGHT_TAGS, AnswerPlace
from qlora_train.data.types import Message, UnusableRowError

UNSTABLE = "the chat template writes an answer otherwise depending on its last words, so that its end cannot be found"
MOST_KEPT = 2048
"""Skeletons, and prompts of skeletons, that are kept before all are forgotten."""
ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
MARK = re.compile("\ue000\\d+\ue001")
END_MARK = re.compile("endOfAnswer\\d+X")
"""Stands behind an answer's content, or the name of its last call. ASCII: templates escape other characters in JSON."""
END_OF_BLOCK = re.compile(r"\{%[-+]?\s*endgeneration\s*[-+]?%\}")
STRING_TESTS = frozenset(
    "startswith endswith split rsplit partition rpartition find rfind index count replace".split()  # noqa: SIM905
)
"""Methods by which a template looks for a word in a text."""
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
"""What a template looks for in a message rather than in a text."""


class Chat(Protocol):
    """A chat template and a tokenizer, for one date and one list of tools."""

    def text(self, turns: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return a conversation as text."""

    def blocks(self, turns: Sequence[Message]) -> list[tuple[int, int]] | None:
        """Return the characters in generation blocks; None for a template without them."""


def places_by_prompts(
    chat: Chat, turns: Sequence[Message], text: str, answers: Sequence[int]
) -> dict[int, AnswerPlace]:
    """Find answers by rendering each one's prompt: the turns before it and the generation prompt.

    Args:
        chat: renders.
        turns: the conversation.
        text: its rendering.
        answers: indices of the assistant turns that are asked for.

    Raises:
        UnusableRowError: the text does not begin with a prompt, or an answer has no generation block or is rewritten.
        jinja2.exceptions.TemplateError: the template refuses the turns before an answer.
    """
    blocks = chat.blocks(turns)
    marked = [_with_end_mark(turn, i) if i in answers else turn for i, turn in enumerate(turns)]
    marked_text = chat.text(marked)
    if END_MARK.sub("", marked_text) != text:
        raise UnusableRowError(UNSTABLE)
    places = {}
    for answer in answers:
        prompt = chat.text(turns[:answer], add_generation_prompt=True)
        if not text.startswith(prompt):
            raise UnusableRowError(_why_prompt_differs(chat, turns[:answer], text, prompt))
        before, mark, _ = marked_text.partition(_end_mark(answer))
        if not mark:
            raise UnusableRowError(LOST_CALL if "tool_calls" in turns[answer] else REWRITTEN)
        said_end = len(END_MARK.sub("", before))
        end = said_end + _own_length(chat, marked, answer, text[said_end:])
        places[answer] = AnswerPlace(len(prompt), _learnt_from(blocks, len(prompt)), said_end, end)
    return places


def _why_prompt_differs(chat: Chat, before: Sequence[Message], text: str, prompt: str) -> str:
    reason = "it drops or rewrites earlier turns"
    if text.startswith(chat.text(before)):
        reason = "the answer does not begin as the generation prompt ends"
        if "think" in prompt[-MOST_OPENED:]:
            reason += ": thoughts are opened or closed there, and not so in this answer"
    return f"the chat template renders the prompt of an answer differently with the answer behind it ({reason})"


def _end_mark(answer: int) -> str:
    return f"endOfAnswer{answer}X"


def _with_end_mark(turn: Message, answer: int) -> Message:
    """Return an answer with a mark behind its content; behind the name of its last call where it has calls.

    What a template writes only where a turn comes last, such as empty thoughts, stands before either.
    """
    mark = _end_mark(answer)
    calls = turn.get("tool_calls")
    if not calls:
        said = turn["content"].rstrip()
        return {**turn, "content": said + mark + turn["content"][len(said) :]}
    function = {**calls[-1]["function"], "name": calls[-1]["function"]["name"] + mark}
    return {**turn, "tool_calls": [*calls[:-1], {**calls[-1], "function": function}]}


def _own_length(chat: Chat, marked: Sequence[Message], answer: int, behind: str) -> int:
    """Return how much of the text `behind` an answer's mark is also written in the other position, last or not."""
    mark = _end_mark(answer)
    if answer + 1 < len(marked):
        other = chat.text(marked[: answer + 1])
    elif "tool_calls" in marked[answer]:
        try:
            other = chat.text([*marked, *map(_result_of, marked[answer]["tool_calls"])])
        except TemplateError:
            return len(behind)
    else:
        return len(behind)
    _, found, other_behind = other.partition(mark)
    if not found:
        raise UnusableRowError(REWRITTEN)
    return _common(END_MARK.sub("", other_behind), behind)


def _result_of(call: Mapping[str, Any]) -> Message:
    result: Message = {"role": "tool", "content": "0", "name": call["function"]["name"]}
    return {**result, "tool_call_id": call["id"]} if "id" in call else result


def _learnt_from(blocks: Sequence[tuple[int, int]] | None, prompt_end: int) -> int:
    """Return where learning begins: at the end of the prompt, or where the next generation block does."""
    if blocks is None:
        return prompt_end
    begin = next((begin for begin, end in blocks if end > prompt_end), None)
    if begin is None:
        raise UnusableRowError("the chat template marks some answers with generation blocks, but not all of them")
    return max(prompt_end, begin)


def _common(text: str, other: str) -> int:
    """Return the length of what two texts begin with: a template may write more behind a conversation's last turn."""
    return bisect_left(range(len(text)), True, key=lambda length: not other.startswith(text[: length + 1]))


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The text of a chat template around the contents of one order of roles.

    Attributes:
        pieces: what stands before each content, and behind the last one: one more than there are turns.
        answers: for each assistant turn how many characters of the piece before it belong to its prompt, on how many
            of them it is not learnt yet, and how many characters of the piece behind it belong to the turn.
    """

    pieces: tuple[str, ...]
    answers: Mapping[int, tuple[int, int, int]]

    def places(self, turns: Sequence[Message], text: str) -> dict[int, AnswerPlace] | None:
        """Return the places of all answers, or None if `text` is not the skeleton with the contents in it."""
        places = {}
        position = 0
        for index, (turn, piece, behind) in enumerate(zip(turns, self.pieces, self.pieces[1:], strict=False)):
            begin = position + len(piece)
            length = _written_length(text, begin, turn["content"], behind)
            if length is None or not text.startswith(piece, position):
                return None
            if index in self.answers:
                prompt, learnt, own = self.answers[index]
                end = begin + length
                places[index] = AnswerPlace(position + prompt, position + learnt, end, end + own)
            position = begin + length
        return places if position + len(self.pieces[-1]) == len(text) else None


def _written_length(text: str, begin: int, content: str, behind: str) -> int | None:
    """Return how many characters of a content stand at `begin`, as it is or trimmed; None if it does not."""
    for form in (content, content.strip(), content.lstrip(), content.rstrip(), content.lstrip("\n")):
        if text.startswith(form, begin) and text.startswith(behind, begin + len(form)):
            return len(form)
    return None


class Skeletons:
    """The skeletons of one chat template for rows without tools, made when an order of roles is first met.

    Prompts of marked turns are kept, since longer conversations begin like shorter ones.

    Args:
        chat: renders.
        template: the Jinja text.
    """

    def __init__(self, chat: Chat, template: str) -> None:
        self._chat = chat
        self._made: dict[str, Skeleton | None] = {}
        self._compared: set[str] = set()
        self._rendered: dict[tuple[str, bool], str] = {}
        words = tested_words(template)
        self._is_usable = words is not None
        self._words = re.compile("|".join(map(re.escape, sorted({*(words or ()), *THOUGHT_TAGS}))))

    def find(self, turns: Sequence[Message]) -> tuple[Skeleton | None, str, bool]:
        """Return the skeleton for a conversation, the name of its order of roles, and whether it was never compared.

        None where there is none, or the row says something for which it does not hold.
        """
        order = "".join([turn["role"][0] for turn in turns])
        if not self._is_usable or max(map(len, turns)) > 2 or self._is_tested(turns):
            return None, order, False
        if order not in self._made:
            if len(self._made) >= MOST_KEPT:
                self._made.clear()
                self._compared.clear()
            self._made[order] = self._make(order)
        return self._made[order], order, order not in self._compared

    def trust(self, order: str) -> None:
        """Compare the skeleton of this order of roles no more."""
        self._compared.add(order)

    def distrust(self, order: str) -> None:
        """Take no skeleton for this order of roles from now on."""
        self._made[order] = None

    def _is_tested(self, turns: Sequence[Message]) -> bool:
        return self._words.search("\0".join([turn["content"] for turn in turns])) is not None

    def _make(self, order: str) -> Skeleton | None:
        try:
            text = self._text(order)
            blocks = self._chat.blocks(_marked(order))
            answers = {i: self._around(order, text, i, blocks) for i, role in enumerate(order) if role == "a"}
        except (TemplateError, UnusableRowError):
            return None
        found = MARK.findall(text)
        if found != [turn["content"] for turn in _marked(order)] or None in answers.values():
            return None
        return Skeleton(tuple(MARK.split(text)), {i: around for i, around in answers.items() if around is not None})

    def _around(
        self, order: str, text: str, answer: int, blocks: Sequence[tuple[int, int]] | None
    ) -> tuple[int, int, int] | None:
        """Return an answer's entry in `Skeleton.answers`; None where its prompt is no prefix of the text."""
        prompt = self._text(order[:answer], add_generation_prompt=True)
        before, own = text.find(_mark(answer - 1)), text.find(_mark(answer))
        piece = before + len(_mark(answer - 1)) if answer else 0
        learnt = _learnt_from(blocks, len(prompt))
        if not text.startswith(prompt) or not piece <= len(prompt) <= learnt <= own:
            return None
        behind = own + len(_mark(answer))
        as_last = text if answer + 1 == len(order) else self._text(order[: answer + 1])
        _, mark, behind_as_last = as_last.partition(_mark(answer))
        if not mark:
            return None
        return len(prompt) - piece, learnt - piece, _common(behind_as_last, text[behind:])

    def _text(self, order: str, *, add_generation_prompt: bool = False) -> str:
        key = (order, add_generation_prompt)
        if key not in self._rendered:
            if len(self._rendered) >= MOST_KEPT:
                self._rendered.clear()
            self._rendered[key] = self._chat.text(_marked(order), add_generation_prompt=add_generation_prompt)
        return self._rendered[key]


def _mark(index: int) -> str:
    return f"\ue000{index}\ue001"


def _marked(order: str) -> list[Message]:
    return [{"role": ROLES[role], "content": _mark(index)} for index, role in enumerate(order)]


def tested_words(template: str) -> frozenset[str] | None:
    """Return the words that a template looks for in texts, white space aside; None if it cannot be told.

    A template may render a prompt differently because a message says ``/no_think``: no skeleton shows that.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        tree = environment.parse(END_OF_BLOCK.sub("", GENERATION_BLOCK.sub("", template)))
    except TemplateError:
        return None
    sought: list[nodes.Node] = []
    for comparison in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in comparison.ops):
            sought.append(comparison.expr)
        elif _is_of_content(comparison):
            sought += [comparison.expr, *(operand.expr for operand in comparison.ops)]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in STRING_TESTS:
            sought.extend(call.args)
    for replacement in tree.find_all(nodes.Filter):
        if replacement.name in STRING_TESTS:
            sought.extend(replacement.args)
    names = {node.name for node in sought if isinstance(node, nodes.Name)}
    sought += [
        assignment.node
        for assignment in tree.find_all(nodes.Assign)
        if isinstance(assignment.target, nodes.Name) and assignment.target.name in names
    ]
    words = {node.value for node in sought if isinstance(node, nodes.Const) and isinstance(node.value, str)}
    return frozenset(word for word in words if word.strip() and word not in FIELDS)


def _is_of_content(comparison: nodes.Compare) -> bool:
    """Say whether a comparison concerns what a turn says."""
    fields = [field.attr for field in comparison.find_all(nodes.Getattr)]
    keys = [const.value for const in comparison.find_all(nodes.Const)]
    names = [name.name for name in comparison.find_all(nodes.Name)]
    return "content" in (*fields, *keys, *names)
