"""Text of data, models and configs as HTML shows it: escaped by Jinja, with what is invisible made visible before."""

import json
from typing import Any

from markupsafe import Markup

from qlora_train.utils.visible_text import visible

MAX_CHARACTERS = 4000
"""Characters shown of one text; of a longer one the beginning and the end."""


def shown(value: Any) -> Any:
    """Prepare what a template prints: control characters, changes of direction and lone surrogates become escapes.

    Line breaks and tabs stay. `Markup`, which only the page's own parts are, passes unchanged.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    lines = _shortened(value).split("\n")
    return "\n".join("\t".join(visible(part) for part in line.split("\t")) for line in lines)


def json_block(content: Any) -> Markup:
    """Return JSON for the inside of a script element, which no string of it can end."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
