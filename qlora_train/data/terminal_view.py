"""Rows on a terminal with their loss mask: trained text bold green and context dim, or in brackets without colour.

Of a preference pair the prompt is shown once; its answers stand side by side on a wide terminal, else below each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_train.data.decoded_rows import DecodedRow
from qlora_train.utils.visible_text import shortened, visible

TRAINED, CONTEXT = "bold green", "dim"
OPEN, CLOSE, LINE_END = "⟦", "⟧", "↵"
MAX_SEGMENT_LENGTH = 2000
"""Characters shown of a segment; of a longer one the beginning and the end."""
MIN_WIDTH = 100
"""Columns of a terminal from which on two answers fit beside each other."""
Segments = Sequence[tuple[str, bool]]


def shown_rows(rows: Sequence[DecodedRow], console: Console) -> str:
    """Return rows as text for a console, in colour if it has any.

    Invisible and control characters are escaped; a line break is marked.
    """
    view = _View(console, is_coloured=console.color_system is not None and not console.no_color)
    with console.capture() as captured:
        for number, several in enumerate(_rows_and_pairs(rows), start=1):
            if len(several) == 1:
                view.print_row(number, several[0])
            else:
                view.print_pair(number, *several)
        if rows:
            legend = (view.marked("with loss", trained=True), " ", ("without loss", CONTEXT))
            console.print(Text.assemble(*legend, f" {LINE_END} line break"), soft_wrap=True)
    return captured.get()


def _rows_and_pairs(rows: Sequence[DecodedRow]) -> Iterator[Sequence[DecodedRow]]:
    """Yield single rows, and the two sequences of each preference pair together."""
    index = 0
    while index < len(rows):
        size = 2 if rows[index].answer else 1
        yield rows[index : index + size]
        index += size


@dataclass(frozen=True, slots=True)
class _View:
    console: Console
    is_coloured: bool

    def print_row(self, number: int, row: DecodedRow) -> None:
        self._print_lines(f"row {number}: {row.where}: {_counts(row)}", row.warnings)
        self.console.print(self._text(row.segments), soft_wrap=True, end="\n\n")

    def print_pair(self, number: int, chosen: DecodedRow, rejected: DecodedRow) -> None:
        where = chosen.where.removesuffix(f" ({chosen.answer})")
        self._print_lines(
            f"pair {number}: {where}: chosen {_counts(chosen)}; rejected {_counts(rejected)}", chosen.warnings
        )
        num_shared = _num_shared(chosen.segments, rejected.segments)
        shared, *answers = map(
            self._text, (chosen.segments[:num_shared], chosen.segments[num_shared:], rejected.segments[num_shared:])
        )
        for text in (shared, *answers):
            text.rstrip()
        self.console.print(shared, soft_wrap=True)
        if self.console.width >= MIN_WIDTH:
            self._print_beside(answers)
        else:
            self._print_below(answers)
        self.console.print()

    def _print_beside(self, answers: Sequence[Text]) -> None:
        table = Table(box=None, expand=True, padding=(0, 3, 0, 0), header_style="bold")
        for name in ("chosen", "rejected"):
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*answers)
        self.console.print(table)

    def _print_below(self, answers: Sequence[Text]) -> None:
        for label, answer in zip(("chosen:   ", "rejected: "), answers, strict=True):
            first, *others = answer.split("\n")
            self.console.print(Text(label) + first, soft_wrap=True)
            for line in others:
                self.console.print(Text(" " * len(label)) + line, soft_wrap=True)

    def _print_lines(self, heading: str, warnings: Sequence[str]) -> None:
        for line in (heading, *(f"warning: {warning}" for warning in warnings)):
            self.console.print(Text(visible(line)), soft_wrap=True)

    def _text(self, segments: Segments) -> Text:
        marked = (self.marked(shortened(text, MAX_SEGMENT_LENGTH), trained=trained) for text, trained in segments)
        return Text.assemble(*marked)

    def marked(self, text: str, *, trained: bool) -> tuple[str, str]:
        """Return a segment and its style; without colours, brackets mark a trained one."""
        shown = f"{LINE_END}\n".join(visible(line) for line in text.split("\n"))
        if self.is_coloured or not trained:
            return shown, TRAINED if trained else CONTEXT
        return f"{OPEN}{shown}{CLOSE}", ""


def _counts(row: DecodedRow) -> str:
    return f"{row.num_tokens} tokens, {row.num_labels} of them with loss"


def _num_shared(chosen: Segments, rejected: Segments) -> int:
    """Return the number of equal segments that both begin with."""
    differs = (index for index, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    return next(differs, min(len(chosen), len(rejected)))
