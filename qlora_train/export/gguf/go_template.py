"""Translate a Jinja chat template to a Go template for Ollama, if both provably write the same prompts.

Most chat templates write text between turns that depends only on the two neighbouring roles. Rendering conversations of
marks finds it: the text before the first content (`begins`, by role), between two contents (`between`, by both roles) and
after the last one, generation prompt included (`ends`). If two conversations disagree, or if the result does not render
test contents alike, no Go template is written.

Contents are written unchanged; a chat template that trims them is equal only for contents without outer white space.
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
"""Renders turns and the generation prompt."""
REQUIRED = ("u", "uau", "uauau", "uauauau")
"""Role orders that every template must render, by initials."""
OPTIONAL = ("su", "suau", "suauau", "s", "sau", "au", "auau")
"""Role orders that a template may refuse: no system turn, or an answer first (a truncated conversation)."""
CONTENTS = ("What is 2+2?", '"Four", {{ .Role }} said:\n\n- {% raw %}\n- 4 \\n', "Ünïcode 🚀 <b>&amp;</b>", "x")


class UnsupportedTemplateError(Exception):
    """The chat template has no equivalent Go template; the message is the reason."""


@dataclass
class Separators:
    """The text of a chat template around contents, by neighbouring roles."""

    begins: dict[str, str] = field(default_factory=dict)
    between: dict[tuple[str, str], str] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)

    def render(self, turns: Sequence[Message]) -> str:
        """Return the prompt after these turns."""
        roles = [turn["role"] for turn in turns]
        before = [self.begins[roles[0]], *(self.between[pair] for pair in pairwise(roles))]
        written = "".join(text + turn["content"] for text, turn in zip(before, turns, strict=True))
        return written + self.ends[roles[-1]]

    def add(self, roles: Sequence[str], texts: Sequence[str]) -> None:
        """Add the texts around the contents of one conversation.

        Raises:
            UnsupportedTemplateError: another conversation had other texts.
        """
        _set_equal(self.begins, roles[0], texts[0])
        for pair, text in zip(pairwise(roles), texts[1:-1], strict=True):
            _set_equal(self.between, pair, text)
        _set_equal(self.ends, roles[-1], texts[-1])

    def go_template(self) -> str:
        """Return the Go template.

        Ollama may truncate a long conversation so that it begins with an answer. If the chat template refuses that, an
        empty question is written before it. Any other unseen order of roles is an error in Ollama.
        """
        cases = [*_cases("", self.begins.items())]
        for (previous, role), text in self.between.items():
            cases += _cases(previous, [(role, text)])
        if "assistant" not in self.begins:
            cases += _cases("", [("assistant", self.begins["user"] + self.between["user", "assistant"])])
        if "system" in self.begins and ("system", "assistant") not in self.between:
            empty_question = self.between["system", "user"] + self.between["user", "assistant"]
            cases += _cases("system", [("assistant", empty_question)])
        lines = ['{{- $previous := "" }}', "{{- range .Messages }}"]
        for number, (condition, text) in enumerate(cases):
            lines.append(f"{{{{- {'else ' if number else ''}if {condition} }}}}{_constant(text)}")
        lines += [
            "{{- else }}{{ slice .Role 99 }}",  # out of range: an error
            "{{- end }}{{ .Content }}",
            "{{- $previous = .Role }}",
            "{{- end }}",
        ]
        for role, text in self.ends.items():
            lines.append(f"{{{{- if eq $previous {json.dumps(role)} }}}}{_constant(text)}{{{{- end }}}}")
        return "\n".join(lines)

    def without_bos(self, bos: str) -> "Separators":
        """Return the separators for a program that adds the bos token itself.

        Raises:
            UnsupportedTemplateError: the chat template does not write the bos token.
        """
        begins = {role: text.removeprefix(bos) for role, text in self.begins.items() if text.startswith(bos)}
        if self.begins.keys() - begins.keys() - {"assistant"}:
            raise UnsupportedTemplateError(
                f"the file makes every program add {bos} before a prompt, and the chat template does not write it"
            )
        return Separators(begins, self.between, self.ends)


def find_separators(render: Render, jinja: str) -> tuple[Separators, list[str]]:
    """Return the separators of a chat template, proven to render alike, and the contents that they render differently.

    Raises:
        UnsupportedTemplateError: they do not render alike.
    """
    if CLOCK in jinja:
        raise UnsupportedTemplateError("the chat template writes today's date")
    separators, rendered = Separators(), []
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
                raise UnsupportedTemplateError("the chat template omits, repeats or moves the content of a turn")
            continue
        separators.add([turn["role"] for turn in turns], MARKER.split(text))
        rendered.append(order)
    for order in rendered:
        turns = _turns(order, [CONTENTS[index % len(CONTENTS)] for index in range(len(order))])
        if render(turns) != separators.render(turns):
            raise UnsupportedTemplateError("the chat template rewrites the content of a turn")
    return separators, list(_differences(render, separators, jinja))


def _differences(render: Render, separators: Separators, jinja: str) -> Iterator[str]:
    spaced: list[Message] = [{"role": "user", "content": " one\n"}]
    if render(spaced) != separators.render(spaced):
        yield "outer white space of a turn, which the model's own template trims"
    words = tested_words(jinja)
    if words is None or words:
        yield f"turns with words that the model's own template looks for ({', '.join(sorted(words or ['unknown']))})"


def _turns(order: str, contents: Sequence[str]) -> list[Message]:
    return [{"role": ROLES[role], "content": content} for role, content in zip(order, contents, strict=True)]


def _set_equal(known: dict[Key, str], key: Key, text: str) -> None:
    if known.setdefault(key, text) != text:
        raise UnsupportedTemplateError("the text around a turn depends on more than its neighbours")


def _cases(previous: str, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for role, text in texts:
        yield f"and (eq $previous {json.dumps(previous)}) (eq .Role {json.dumps(role)})", text


def _constant(text: str) -> str:
    """Return text as a Go constant; unprintable characters are escaped, since Ollama drops them from a Modelfile."""
    quoted = json.dumps(text, ensure_ascii=False)
    constant = "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)
    return f"{{{{ {constant} }}}}" if text else ""
