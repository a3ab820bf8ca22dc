"""Write docs/config.md from the schema of the config.

    python scripts/config_reference.py [FILE]

A test holds the page to what this writes.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from qlora_train.config import RunConfig
from qlora_train.config.allowed_values import allowed_values
from qlora_train.config.resume_policy import FIXED_SHAPE, is_mutable

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """# Every setting

This page is made by `python scripts/config_reference.py` from `qlora_train/config/schema.py`. `qlora-train show CONFIG`
prints the settings of a config with the place each comes from, `qlora-train schema` a JSON schema for editors. Any setting
can be changed on the command line: `qlora-train CONFIG train.learning_rate=1e-4`.

On resume a setting marked *free* may change. Others need `run.allow_changed: [section.key]`, which names the effect; those
marked *fixed* cannot change within a run.
"""


def page() -> str:
    """Return the text of the page."""
    sections = RunConfig.model_json_schema()
    parts = [HEAD]
    for name, reference in sections["properties"].items():
        spec = sections["$defs"][_reference(reference)]
        parts.append(f"\n## {name}\n\n{spec['description'].strip()}\n\n")
        parts.append("| key | default | allowed | meaning |\n|---|---|---|---|\n")
        parts += [_row(name, key, values, spec.get("required", ())) for key, values in spec["properties"].items()]
    return "".join(parts)


def _row(section: str, key: str, values: dict[str, Any], required: Any) -> str:
    setting = f"{section}.{key}"
    on_resume = " *fixed*" if setting in FIXED_SHAPE else " *free*" if is_mutable(setting) else ""
    default = "required" if key in required else _code(values.get("default"))
    meaning = re.sub(r"\s+", " ", values["description"])
    return f"| `{key}`{on_resume} | {default} | {_cell(allowed_values((section, key)))} | {_cell(meaning)} |\n"


def _code(value: Any) -> str:
    if value is None:
        return "unset"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _reference(spec: dict[str, Any]) -> str:
    found = re.search(r"#/\$defs/(\w+)", json.dumps(spec))
    assert found is not None
    return found[1]


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page(), encoding="utf-8")
