"""`qlora-train convert THEIR.yaml`, which needs the config package only."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_train.cli.output import print_text
from qlora_train.utils.atomic_io import write_text
from qlora_train.utils.errors import ConfigError

if TYPE_CHECKING:
    from qlora_train.config.other_trainers.conversion import Conversion

TRAINERS = "axolotl, llamafactory, trl, unsloth, torchtune, ms-swift"
Theirs = Annotated[Path, typer.Argument(metavar="THEIR.yaml", help=f"Config of {TRAINERS}; or a command in a .sh file")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="New file (default: standard output)")
]
Trainer = Annotated[str | None, typer.Option("--from", metavar="NAME", help="Trainer, if the keys do not show it")]


def convert(theirs: Theirs, output: Output = None, trainer: Trainer = None) -> int:
    """Convert the config of another trainer; list what differs and what cannot be carried over. No torch."""
    from qlora_train.config.other_trainers import conversion
    from qlora_train.config.other_trainers.converted_yaml import to_yaml
    from qlora_train.config.other_trainers.other_config_file import read_other_config

    if output is not None and output.exists():
        raise ConfigError(f"{output}: exists; give -o another name, or delete it")
    result = conversion.convert(read_other_config(theirs, trainer))
    text = to_yaml(result, str(theirs))
    if output is None:
        print_text(text.rstrip("\n"))
    else:
        write_text(output, text)
    _print_report(result, theirs, output)
    return 2 if result.problems else 0


def _print_report(result: "Conversion", theirs: Path, output: Path | None) -> None:
    """Print the lists, beside the YAML on standard error."""
    from qlora_train.config.other_trainers.converted_yaml import defaults_line, item_lines, lists, unset_line

    stream = sys.stderr if output is None else sys.stdout
    num_settings = len(result.settings)
    lines = [
        f"{theirs}: a config of {result.trainer.title}; {num_settings} settings{f' -> {output}' if output else ''}"
    ]
    for title, items in lists(result):
        lines += [f"{title} ({len(items)}):", *(f"  {line}" for line in item_lines(items))]
    if defaults := defaults_line(result):
        lines.append(defaults)
    if result.unset:
        lines.append(unset_line(result))
    lines += [f"{output or 'the result'}: not complete: {problem}" for problem in result.problems]
    if not result.problems and output is not None:
        lines.append(f"Next: qlora-train check {output}; qlora-train data {output} shows rows and their loss mask")
    print("\n".join(lines), file=stream)
