"""Rows on a terminal with their loss mask: trained text bold green and context dim, or in brackets without colour."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from qlora_train.data.decoded_rows import DecodedRow
from qlora_train.utils.visible_text import shortened, visible

TRAINED, CONTEXT = "bold green", "dim"
OPEN, CLOSE, LINE_END = "⟦", "⟧", "↵"
MAX_SEGMENT_LENGTH = 2000
"""Characters shown of a segment; of a longer one the beginning and the end."""


def shown_rows(rows: Sequence[DecodedRow], console: Console) -> str:
    """Return rows as text for a console, in colour if it has any.

    Invisible and control characters are escaped; a line break is marked.
    """
    coloured = console.color_system is not None and not console.no_color
    with console.capture() as captured:
        for number, row in enumerate(rows, start=1):
            heading = f"row {number}: {row.where}: {row.num_tokens} tokens, {row.num_labels} of them with loss"
            for line in (heading, *(f"warning: {warning}" for warning in row.warnings)):
                console.print(Text(visible(line)), soft_wrap=True)
            marked = (
                _marked(shortened(text, MAX_SEGMENT_LENGTH), trained=trained, coloured=coloured)
                for text, trained in row.segments
            )
            console.print(Text.assemble(*marked), soft_wrap=True, end="\n\n")
        if rows:
            legend = (_marked("with loss", trained=True, coloured=coloured), " ", ("without loss", CONTEXT))
            console.print(Text.assemble(*legend, f" {LINE_END} line break"), soft_wrap=True)
    return captured.get()


def _marked(text: str, *, trained: bool, coloured: bool) -> tuple[str, str]:
    """Return a segment and its style; without colours, brackets mark a trained one."""
    shown = f"{LINE_END}\n".join(visible(line) for line in text.split("\n"))
    if coloured or not trained:
        return shown, TRAINED if trained else CONTEXT
    return f"{OPEN}{shown}{CLOSE}", ""
