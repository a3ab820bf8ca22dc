"""Text of data, models and configs as HTML shows it: escaped by Jinja, with what is invisible made visible before."""

import json
from typing import Any

from markupsafe import Markup

from qlora_train.utils.visible_text import shortened, visible

MAX_CHARACTERS = 4000
"""Characters shown of one text; of a longer one the beginning and the end."""


def shown(value: Any) -> Any:
    """Prepare what a template prints: control characters, changes of direction and lone surrogates become escapes.

    Line breaks and tabs stay. `Markup`, which only the page's own parts are, passes unchanged.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = shortened(value, MAX_CHARACTERS)
    return text if text.isprintable() else visible(text, keep="\n\t")


def json_block(content: Any) -> Markup:
    """Return JSON for the inside of a script element, which no string of it can end."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))
