"""What the data stage hands on: rows become examples, examples become batches. No torch."""

from dataclasses import dataclass
from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation: `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row, in the one shape that all formats are read into.

    Exactly one of `messages` and `text` is set. `where` is ``file:line`` (or ``dataset[split]:row N``), for people.
    `prompt` stands before `text` and carries no loss. Turns before index `loss_from` carry no loss: they are the
    prompt of a row that keeps prompt and completion apart.
    """

    where: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    prompt: str | None = None
    loss_from: int = 0


@dataclass(frozen=True, slots=True)
class Unusable:
    """A row that cannot be trained on; rows with the same `reason` are counted together."""

    where: str
    reason: str


class UnusableRowError(Exception):
    """Raised inside the data stage with the reason why one row cannot be used; it becomes an `Unusable`."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row as tokens.

    `input_ids` and `loss_mask` have equal length (seq,); a token with a true mask is a label. `prompt` holds the turns
    before the last assistant turn and `answer` that turn's text, for generation; both are None for plain text. The
    first token is never a label, since nothing predicts it.
    """

    where: str
    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    prompt: tuple[Message, ...] | None
    answer: str | None


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Everything the trainer and the evaluation need.

    `dropped` counts unusable rows by reason; `fingerprint` is a sha256 of all tokens and masks in order.
    """

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    dropped: dict[str, int]
    fingerprint: str
