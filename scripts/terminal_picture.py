"""Take a picture of a run's live view: run a command on a pseudo-terminal, and draw one of its screens as SVG.

    python scripts/terminal_picture.py --when "step 30/" -o docs/images/terminal.svg -- configs/demo.yaml run.samples=1

Needs pyte (a development dependency).
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.terminal import Terminal

COLUMNS, ROWS = 80, 24
COLOURS = {"default": None, "brown": "yellow", "brightbrown": "bright_yellow"}
"""pyte's names of colours where rich has others."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--when", required=True, help="text on the screen; the last screen with it is drawn")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("words", nargs="+", help="arguments of qlora-train")
    options = parser.parse_args()
    terminal = Terminal(["-m", "qlora_train.cli.main", *options.words], columns=COLUMNS, rows=ROWS)
    picture: list[Text] = []
    while terminal.run_until(lambda screen: any(options.when in line for line in screen), timeout=3600):
        picture = drawn(terminal)
    print("\n".join(line.plain.rstrip() for line in picture))
    status = terminal.process.wait()
    if status or not picture:
        print(f"status {status}, {'a' if picture else 'no'} screen with {options.when!r}", file=sys.stderr)
        return 1
    console = Console(width=COLUMNS, record=True, file=Path("/dev/null").open("w"), force_terminal=True)  # noqa: SIM115
    for line in picture:
        console.print(line, no_wrap=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(console.export_svg(title="qlora-train configs/demo.yaml"), encoding="utf-8")
    return 0


def drawn(terminal: Terminal) -> list[Text]:
    """Return the lines of the screen with their colours, without empty ones at its end."""
    lines = []
    for row in range(terminal.screen.lines):
        line = Text()
        cells = [terminal.screen.buffer[row][column] for column in range(terminal.screen.columns)]
        for (foreground, bold), same in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            line.append("".join(cell.data for cell in same), Style(color=colour(foreground), bold=bold))
        lines.append(line)
    while lines and not lines[-1].plain.strip():
        lines.pop()
    return lines


def colour(name: str) -> str | None:
    """Return rich's name of a colour of pyte."""
    if name in COLOURS:
        return COLOURS[name]
    if len(name) == 6 and all(character in "0123456789abcdef" for character in name):
        return f"#{name}"
    return name.replace("bright", "bright_")


if __name__ == "__main__":
    sys.exit(main())
