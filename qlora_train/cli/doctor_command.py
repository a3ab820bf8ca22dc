"""`qlora-train doctor`: what this machine can do."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from qlora_train.cli.output import print_text
from qlora_train.utils.secrets import redact


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False) -> int:
    """Check GPU, libraries, memory, disk and network, and train a pico model for two steps."""
    from qlora_train.doctor import run_checks

    # no prepare_libraries: it hides all GPUs but one, and imports what the checks may find broken
    found = []
    for check in run_checks():
        found.append(check)
        if not as_json:
            print_text(redact(check.line()))
    num_problems, num_notes = (sum(check.status == status for check in found) for status in ("problem", "note"))
    works = num_problems == 0
    if as_json:
        print_text(redact(json.dumps({"works": works, "checks": [asdict(check) for check in found]}, indent=2)))
    else:
        summary = ["ready: training works here"] if works else [f"not ready: {_counted(num_problems, 'problem')}"]
        print_text("; ".join([*summary, *([_counted(num_notes, "note")] if num_notes else [])]))
    return 0 if works else 2


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
