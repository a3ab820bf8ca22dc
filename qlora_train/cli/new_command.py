"""`qlora-train new MODEL`."""

from pathlib import Path
from typing import Annotated

import typer

from qlora_train.cli.options import Offline
from qlora_train.cli.output import print_text
from qlora_train.cli.plan_command import Memory

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="Hub id, local folder or .gguf file")]
Data = Annotated[
    str | None, typer.Option("--data", metavar="FILE", help="Training data: a file, or a Hub id (else example rows)")
]
HeldOut = Annotated[str | None, typer.Option("--eval", metavar="FILE", help="Held-out data (a share of --data)")]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME", help="Recipe to begin with; `list` prints them (by the data)")
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="YAML file to write (a name of model and data)")
]


def new(
    model: Model = None,
    data: Data = None,
    held_out: HeldOut = None,
    recipe: RecipeName = None,
    output: Output = None,
    memory: Memory = None,
    offline: Offline = False,
) -> None:
    """Write a commented config for a model and a data file, check it, and print its plan."""
    from qlora_train.authoring.new_config import recipe_lines, write_new_config
    from qlora_train.utils import network
    from qlora_train.utils.visible_text import visible

    if recipe == "list":
        print_text("\n".join(recipe_lines()))
        return
    if model is None:
        raise typer.BadParameter("MODEL is missing: a Hub id, a local folder or a .gguf file")
    if offline:
        network.go_offline()
    lines = write_new_config(model, data=data, recipe=recipe, output=output, held_out=held_out, memory=memory)
    print_text("\n".join(visible(line) for line in lines))
