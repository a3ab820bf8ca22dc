"""A chat template of Jinja as a Go template for Ollama, where the two can be proven to write the same prompts.

Most chat templates write text between the turns that depends on nothing but the roles on either side. That text is found
by rendering conversations of marks: what stands before the first content (`begins`, by its role), between two contents
(`separators`, by both roles) and behind the last one, generation prompt included (`ends`). A template for which two
conversations disagree on it is not of this form, and no Go template is written: a prompt that the model was not trained on
costs quality without a word.

Contents are written as they are. A template that trims them is the same for contents without white space at their ends.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from jinja2.exceptions import TemplateError

from qlora_train.data.chat_template import CLOCK
from qlora_train.data.template_layout import MARKER, ROLES, tested_words
from qlora_train.data.types import Message

Key = TypeVar("Key")
Render = Callable[[Sequence[Message]], str]
"""Renders the prompt for the next answer: the turns and the generation prompt."""
REQUIRED = ("u", "uau", "uauau", "uauauau")
"""Orders of roles that every template must write, by initials."""
OPTIONAL = ("su", "suau", "suauau", "s", "sau", "au", "auau")
"""Orders that a template may refuse: some know no system turn, and none begins with an answer but a cut conversation."""
CONTENTS = ("What is 2+2?", '"Four", {{ .Role }} said:\n\n- {% raw %}\n- 4 \\n', "Ünïcode 🚀 <b>&amp;</b>", "x")


class UnsupportedTemplateError(Exception):
    """The chat template cannot be written as such a Go template; the message says why."""


@dataclass
class Separators:
    """What a chat template writes around contents, by the roles on either side."""

    begins: dict[str, str] = field(default_factory=dict)
    separators: dict[tuple[str, str], str] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)

    def text(self, turns: Sequence[Message]) -> str:
        """Return the prompt after these turns."""
        roles = [turn["role"] for turn in turns]
        before = [self.begins[roles[0]], *(self.separators[pair] for pair in pairwise(roles))]
        written = "".join(piece + turn["content"] for piece, turn in zip(before, turns, strict=True))
        return written + self.ends[roles[-1]]

    def learn(self, roles: Sequence[str], pieces: Sequence[str]) -> None:
        """Take the pieces of one conversation.

        Raises:
            NotOfThisFormError: another conversation had others.
        """
        before, end = pieces[:-1], pieces[-1]
        _agree(self.begins, roles[0], before[0])
        for pair, piece in zip(pairwise(roles), before[1:], strict=True):
            _agree(self.separators, pair, piece)
        _agree(self.ends, roles[-1], end)

    def go_template(self) -> str:
        """Return the Go template.

        Ollama may cut a long conversation so that it begins with an answer. Where the chat template refuses that, an
        empty question stands before it. Any other order that was not seen is an error rather than a guess.
        """
        cases = [*_cases("", self.begins.items())]
        for (previous, role), text in self.separators.items():
            cases += _cases(previous, [(role, text)])
        if "assistant" not in self.begins:
            cases += _cases("", [("assistant", self.begins["user"] + self.separators["user", "assistant"])])
        if "system" in self.begins and ("system", "assistant") not in self.separators:
            cut = self.separators["system", "user"] + self.separators["user", "assistant"]
            cases += _cases("system", [("assistant", cut)])
        lines = ['{{- $previous := "" }}', "{{- range .Messages }}"]
        for number, (condition, text) in enumerate(cases):
            lines.append(f"{{{{- {'else ' if number else ''}if {condition} }}}}{_written(text)}")
        lines += [
            "{{- else }}{{ slice .Role 99 }}",
            "{{- end }}{{ .Content }}",
            "{{- $previous = .Role }}",
            "{{- end }}",
        ]
        for role, text in self.ends.items():
            lines.append(f"{{{{- if eq $previous {json.dumps(role)} }}}}{_written(text)}{{{{- end }}}}")
        return "\n".join(lines)

    def without_bos(self, bos: str) -> "Separators":
        """Return these joints for a program that writes the beginning token itself.

        Raises:
            NotOfThisFormError: the chat template does not write it.
        """
        begins = {role: text.removeprefix(bos) for role, text in self.begins.items() if text.startswith(bos)}
        if self.begins.keys() - begins.keys() - {"assistant"}:
            raise UnsupportedTemplateError(
                f"the file makes every program put {bos} before a prompt, and the chat template writes none"
            )
        return Separators(begins, self.separators, self.ends)


def find_separators(render: Render, jinja: str) -> tuple[Separators, list[str]]:
    """Find the joints of a chat template, and prove that they write what it writes.

    Returns:
        The joints, and what is not the same for every content, in words.

    Raises:
        NotOfThisFormError: they cannot write it.
    """
    if CLOCK in jinja:
        raise UnsupportedTemplateError("the chat template writes today's date")
    separators, seen = Separators(), []
    for order in (*REQUIRED, *OPTIONAL):
        turns = _turns(order, [f"\ue000{index}\ue001" for index in range(len(order))])
        try:
            text = render(turns)
        except TemplateError as error:
            if order in REQUIRED:
                raise UnsupportedTemplateError(f"the chat template refuses a plain conversation: {error}") from None
            continue
        if MARKER.findall(text) != [turn["content"] for turn in turns]:
            if order in REQUIRED or order == "su":
                raise UnsupportedTemplateError("the chat template leaves out, repeats or moves what a turn says")
            continue
        separators.learn([turn["role"] for turn in turns], MARKER.split(text))
        seen.append(order)
    for order in seen:
        turns = _turns(order, [CONTENTS[index % len(CONTENTS)] for index in range(len(order))])
        if render(turns) != separators.text(turns):
            raise UnsupportedTemplateError("the chat template rewrites what a turn says")
    return separators, list(_differences(render, separators, jinja))


def _differences(render: Render, separators: Separators, jinja: str) -> Iterator[str]:
    spaced: list[Message] = [{"role": "user", "content": " one\n"}]
    if render(spaced) != separators.text(spaced):
        yield "white space at the ends of a turn, which the model's own template trims"
    words = tested_words(jinja)
    if words is None or words:
        yield f"turns with words that the model's own template looks for ({', '.join(sorted(words or ['unknown']))})"


def _turns(order: str, contents: Sequence[str]) -> list[Message]:
    return [{"role": ROLES[role], "content": content} for role, content in zip(order, contents, strict=True)]


def _agree(known: dict[Key, str], key: Key, text: str) -> None:
    if known.setdefault(key, text) != text:
        raise UnsupportedTemplateError(
            "the chat template writes other text around a turn depending on more than its neighbours"
        )


def _cases(previous: str, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for role, text in texts:
        yield f"and (eq $previous {json.dumps(previous)}) (eq .Role {json.dumps(role)})", text


def _written(text: str) -> str:
    """Return text as a constant of Go: nothing in it is trimmed, or taken for a template.

    Ollama drops characters that are not printable when it reads a Modelfile, so they are escaped.
    """
    quoted = json.dumps(text, ensure_ascii=False)
    constant = "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)
    return f"{{{{ {constant} }}}}" if text else ""
