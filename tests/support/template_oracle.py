"""Chat templates rendered by Jinja alone, as an independent reference."""

import datetime
import json
import re
from pathlib import Path

import trl
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

DATE = datetime.date(2024, 2, 29)


REAL = Path(trl.__file__).parent / "chat_templates"


BLOCK = re.compile(r"(\{%[-+]?)\s*(end)?generation\s*([-+]?%\})")


def environment() -> ImmutableSandboxedEnvironment:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= {"raise_exception": refuse, "strftime_now": DATE.strftime}
    return environment


def without_blocks(template: str) -> str:
    """Return a template with generation blocks replaced by `if`, which keeps the white space around them."""
    return BLOCK.sub(lambda tag: f"{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}", template)
