"""Hook of mkdocs: links to files outside of docs/ become their names, which the site does not hold."""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_keywords: Any) -> str:
    """Return the page with such links as code."""
    return OUTSIDE.sub(lambda link: link[1] if link[1].startswith("`") else f"{link[1]} (`{link[2]}`)", markdown)
