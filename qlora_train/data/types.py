"""The types of the data stage: records become rows, rows become examples, examples become batches. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

MAX_REASON_LENGTH = 200

TokenArray = npt.NDArray[np.int32]
MaskArray = npt.NDArray[np.bool_]
LogpArray = npt.NDArray[np.float32]
"""Log-probabilities summed over labels, (num_rows, num_sequences): one sequence per row, or both of a pair."""


@dataclass(frozen=True, slots=True)
class Record:
    """The columns of one row as in the file, and its location: ``file:line`` or ``file:row N``."""

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
    """One usable row, the same type for all formats; exactly one of `messages`, `text` and `input_ids` is set.

    Attributes:
        where: ``file:line`` or ``dataset[split]:row N``.
        prompt: precedes `text`; not trained, unless `data.train_on` is `all`.
        loss_from: index of the first message of the completion, where the row separates prompt and completion.
        untrained: indices of assistant turns that the row excludes from training.
        tools: JSON schemas of the functions that the assistant may call.
        chat_template_kwargs: more variables for the chat template.
        warnings: see `Example.warnings`.
        input_ids: a pre-tokenised row, (seq,).
        loss_mask: its labels, (seq,).
        rejected: the worse answer to the same prompt, of a preference pair.
        desirable: whether the answer is to become likelier, of an unpaired preference.
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
    rejected: "Row | None" = None
    desirable: bool | None = None


class UnusableRowError(Exception):
    """One row cannot be used, with the reason; equal reasons are counted together."""

    @property
    def reason(self) -> str:
        """The reason in one short line; the error's text may quote a row or a chat template."""
        line = " ".join(str(self).split())
        return line if len(line) <= MAX_REASON_LENGTH else line[:MAX_REASON_LENGTH] + "..."


Prompt = tuple[Message, ...] | str
"""A model's input: the turns so far, or plain text to continue."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A tokenised row; of a preference pair, the chosen answer.

    Attributes:
        where: see `Row.where`.
        input_ids: int32 (seq,).
        loss_mask: bool (seq,), true where the token is a label; never for the first, which nothing predicts.
        prompt: for generation: the turns before the last assistant turn, or a plain prompt. None for text without a
            prompt, tokens, conversations with tools or `chat_template_kwargs`, and rows that are not generated from.
        answer: the text of the last assistant turn, or the plain completion; None with `prompt`.
        warnings: about a row that is used all the same; rows with equal warnings are counted together.
        rejected: the sequence with the other answer of a preference pair.
        reference_logp: log-probability of the labels under the reference model; None: not computed before training.
        desirable: whether the answer is to become likelier, of an unpaired preference.
        mismatched: the prompt with the answer of another row, of an unpaired preference in a training step.
    """

    where: str
    input_ids: TokenArray
    loss_mask: MaskArray
    prompt: Prompt | None = None
    answer: str | None = None
    warnings: tuple[str, ...] = ()
    rejected: "Example | None" = None
    reference_logp: float | None = None
    desirable: bool | None = None
    mismatched: "Example | None" = None

    @property
    def sequences(self) -> "tuple[Example, ...]":
        """The sequences that a model reads: one, or the chosen and the rejected one of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)

    def with_reference_logps(self, logps: Sequence[float]) -> "Example":
        """Return it with the `reference_logp` of each of its sequences."""
        assert len(logps) == len(self.sequences)
        rejected = self.rejected
        if rejected is not None:
            rejected = replace(rejected, reference_logp=logps[1])
        return replace(self, reference_logp=logps[0], rejected=rejected)

    def with_label(self, *, desirable: bool) -> "Example":
        """Return an unpaired preference."""
        return replace(self, desirable=desirable)

    def with_mismatched(self, mismatched: "Example") -> "Example":
        """Return the row with its mismatched sequence."""
        return replace(self, mismatched=mismatched)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first label."""
        return int(np.argmax(self.loss_mask))

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence.input_ids) for sequence in self.sequences)

    @property
    def num_labels(self) -> int:
        """Label tokens of all sequences."""
        return sum(int(np.count_nonzero(sequence.loss_mask)) for sequence in self.sequences)
