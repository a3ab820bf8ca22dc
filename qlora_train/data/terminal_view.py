"""Rows on a terminal with their loss mask: trained text bold green and context dim, or in brackets where no colour is."""

import unicodedata
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from qlora_train.data.rendered_rows import RenderedRow

TRAINED, CONTEXT = "bold green", "dim"
OPEN, CLOSE, LINE_END = "⟦", "⟧", "↵"
LONGEST_SEGMENT = 2000
"""Characters that are shown of a piece; of a longer one the beginning and the end."""
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories whose characters a terminal obeys, or which turn the direction of writing or cannot be seen."""
JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
"""Of those, what emoji and several scripts are written with."""


def shown_rows(rows: Sequence[RenderedRow], console: Console) -> str:
    """Return rows as text for a console, in colour if it has any.

    A character that nobody would see, or that the terminal would obey, is an escape; a line break is marked and kept.
    """
    coloured = console.color_system is not None and not console.no_color
    with console.capture() as captured:
        for number, row in enumerate(rows, start=1):
            heading = f"row {number}: {row.where}: {row.num_tokens} tokens, {row.num_labels} of them with loss"
            for line in (heading, *(f"warning: {warning}" for warning in row.warnings)):
                console.print(Text(visible(line)), soft_wrap=True)
            marked = (_marked(_shortened(text), trained=trained, coloured=coloured) for text, trained in row.segments)
            console.print(Text.assemble(*marked), soft_wrap=True, end="\n\n")
        if rows:
            legend = (_marked("with loss", trained=True, coloured=coloured), " ", ("without loss", CONTEXT))
            console.print(Text.assemble(*legend, f" {LINE_END} line break"), soft_wrap=True)
    return captured.get()


def visible(text: str) -> str:
    """Return text with an escape in place of every character that could not be seen or would not stay text."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in JOINERS or unicodedata.category(character) not in UNSEEN:
        return character
    return character.encode("unicode_escape").decode("ascii")


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_SEGMENT:
        return text
    half = LONGEST_SEGMENT // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _marked(text: str, *, trained: bool, coloured: bool) -> tuple[str, str]:
    """Return a piece and its style; without colours brackets say that it is trained."""
    seen = f"{LINE_END}\n".join(visible(line) for line in text.split("\n"))
    if coloured or not trained:
        return seen, TRAINED if trained else CONTEXT
    return f"{OPEN}{seen}{CLOSE}", ""
