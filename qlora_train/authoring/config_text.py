"""Settings -> the text of a YAML file: above each key what it is, from the schema, and beside it why it has this value."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any

from qlora_train.authoring.recipe_files import Choice, Recipe
from qlora_train.config import RunConfig
from qlora_train.config.writer import inline_yaml
from qlora_train.utils.visible_text import visible

WIDTH = 120
MAX_REASON_COLUMN = 118
FIRST_SENTENCE = re.compile(r"(?<=[.;])(?<!e\.g\.)\s")


def config_text(settings: dict[str, Choice], recipe: Recipe, name: str) -> str:
    """Return the text of a config.

    Args:
        settings: by `section.key`.
        recipe: that they began with.
        name: of the file, for the commands in it.
    """
    name = visible(name)
    lines = [f"# {line}" for line in _wrapped(recipe.header, WIDTH - 2)]
    lines += [f"# Written by `qlora-train new` from the recipe {recipe.name}.", "#"]
    lines += [
        f"# qlora-train data {name}   shows the rows as the model sees them; look at them first",
        f"# qlora-train {name}        trains; the same command resumes",
        f"# qlora-train show {name}   prints every setting, also those that have their default",
    ]
    for section, field in RunConfig.model_fields.items():
        keys = {key.partition(".")[2]: choice for key, choice in settings.items() if key.startswith(f"{section}.")}
        if keys:
            lines += ["", f"{section}:"]
            lines += _section_lines(keys, field.annotation)
    return "\n".join(lines) + "\n"


def _section_lines(keys: dict[str, Choice], section: Any) -> Iterator[str]:
    in_order = [key for key in section.model_fields if key in keys]
    for key in in_order:
        described = FIRST_SENTENCE.split(" ".join((section.model_fields[key].description or "").split()))[0]
        yield from (f"  # {line}" for line in _wrapped(described.rstrip(";"), WIDTH - 4))
        written = f"  {key}: {_value(keys[key].value)}"
        reason = visible(keys[key].reason)
        if not reason:
            yield written
        elif len(written) + len(reason) + 4 <= MAX_REASON_COLUMN:
            yield f"{written}  # {reason}"
        else:
            yield from (f"  # -> {line}" for line in _wrapped(reason, WIDTH - 7))
            yield written


def _value(value: Any) -> str:
    """Return a value as YAML in one line."""
    if isinstance(value, float) and 0 < value < 0.001:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return inline_yaml(value)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(visible(text), width)
