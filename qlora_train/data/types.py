"""What the data stage hands on: rows become examples, examples become batches. No torch."""

from dataclasses import dataclass
from typing import Self, TypedDict

LONGEST_REASON = 200
"""Characters of the reason why a row cannot be used."""


class Message(TypedDict):
    """One turn of a conversation: `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row, in the one shape that all formats are read into.

    Exactly one of `messages` and `text` is set. `where` is ``file:line`` (or ``dataset[split]:row N``), for people.
    `prompt` stands before `text`, turns before index `loss_from` before the completion of a row that keeps the two
    apart; neither carries loss, unless `data.loss_on` is `all`.
    """

    where: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    prompt: str | None = None
    loss_from: int = 0


class UnusableRowError(Exception):
    """Raised inside the data stage with the reason why one row cannot be used; it becomes an `Unusable`."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """A row that cannot be trained on; rows with the same `reason`, one short line, are counted together."""

    where: str
    reason: str

    @classmethod
    def because(cls, where: str, error: UnusableRowError) -> Self:
        """Make one of an error, whose text may hold what a row or a chat template says."""
        line = " ".join(str(error).split())
        return cls(where, line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "...")


Prompt = tuple[Message, ...] | str
"""What a model is asked: the turns so far, or plain text to go on from."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row as tokens.

    `input_ids` and `loss_mask` have equal length (seq,); a token with a true mask is a label. `prompt` and `answer` are
    for generation: the turns before the last assistant turn and that turn's text; the texts of a plain prompt and its
    completion; both None for text without a prompt. The first token is never a label, since nothing predicts it.
    """

    where: str
    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    prompt: Prompt | None
    answer: str | None


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Everything the trainer and the evaluation need.

    `dropped` counts the rows that were left out by ``data.train: reason`` and ``data.eval: reason``; rows that a share
    for `data.eval` would have held out are counted where they were read, under ``data.train``. `fingerprint` is a sha256
    of all tokens and masks in order.
    """

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    dropped: dict[str, int]
    fingerprint: str
