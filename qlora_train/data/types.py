"""What the data stage hands on: records become rows, rows become examples, examples become batches. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, Self, TypedDict

import numpy as np
import numpy.typing as npt

LONGEST_REASON = 200
"""Characters of the reason why a row cannot be used."""
NUM_LOCATIONS = 5
"""Places that are kept of rows counted together."""

TokenArray = npt.NDArray[np.int32]
MaskArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Record:
    """The columns of one row as the file has them, and where it stands: ``file:line`` or ``file:row N``."""

    where: str
    values: dict[str, Any]


class Message(TypedDict):
    """One turn of a conversation: `role` is system, user, assistant or tool.

    The optional fields are those that chat templates read; a message has them only where the row does.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row, in the one shape that all formats are read into.

    Exactly one of `messages`, `text` and `input_ids` is set. `where` is ``file:line`` (or ``dataset[split]:row N``), for
    people. `prompt` stands before `text`, turns before index `loss_from` before the completion of a row that keeps the
    two apart; neither carries loss, unless `data.train_on` is `all`.

    Attributes:
        untrained: indices of assistant turns that the row itself says not to learn.
        tools: JSON schemas of the functions that the assistant may call.
        chat_template_kwargs: more variables for the chat template.
        notes: see `Example.warnings`.
        input_ids: a row that came as tokens, (seq,).
        loss_mask: its labels, (seq,).
    """

    where: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    prompt: str | None = None
    loss_from: int = 0
    untrained: frozenset[int] = frozenset()
    tools: tuple[Mapping[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    input_ids: tuple[int, ...] | None = None
    loss_mask: tuple[bool, ...] | None = None


class UnusableRowError(Exception):
    """Raised inside the data stage with the reason why one row cannot be used; equal reasons are counted together."""

    @property
    def reason(self) -> str:
        """The reason in one short line; the error's text may hold what a row or a chat template says."""
        line = " ".join(str(self).split())
        return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "..."


@dataclass(slots=True)
class ReasonCounts:
    """Rows counted by reason, with the first few places of each."""

    counts: dict[str, int] = field(default_factory=dict)
    locations: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Count one row."""
        self._add(reason, 1, (where,))

    def merge(self, other: Self) -> None:
        """Count what another one has counted, later in the data."""
        for reason, count in other.counts.items():
            self._add(reason, count, other.locations[reason])

    def _add(self, reason: str, count: int, locations: Iterable[str]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        known = self.locations.setdefault(reason, [])
        known.extend(list(locations)[: NUM_LOCATIONS - len(known)])

    @property
    def total(self) -> int:
        """How many rows were counted."""
        return sum(self.counts.values())


Prompt = tuple[Message, ...] | str
"""What a model is asked: the turns so far, or plain text to go on from."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A row as tokens.

    `input_ids`, int32, and `loss_mask`, bool, have equal length (seq,); a token with a true mask is a label. `prompt` and
    `answer` are for generation: the turns before the last assistant turn and that turn's text; the texts of a plain
    prompt and its completion; both None for text without a prompt, tokens, conversations with tools or with
    `chat_template_kwargs`, and where nobody will generate. The first token is never a label, since nothing predicts it.
    `warnings` are things to know about the row that do not keep it from being used; rows with the same note are counted
    together.
    """

    where: str
    input_ids: TokenArray
    loss_mask: MaskArray
    prompt: Prompt | None = None
    answer: str | None = None
    warnings: tuple[str, ...] = ()
