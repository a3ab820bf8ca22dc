"""Numbers as a report writes them: a unit for each, thousands separated, no more digits than mean something."""

import math
from collections.abc import Mapping
from typing import Any

MISSING = "-"
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def number_text(value: float | None, unit: str = "") -> str:
    """Return a number with its unit; `bytes`, `seconds` and `share` are converted, None is a dash."""
    if value is None or not math.isfinite(value):
        return MISSING if value is None else str(value)
    converted = {"bytes": bytes_text, "seconds": duration_text, "share": share_text}.get(unit)
    if converted is not None:
        return converted(value)
    shown = significant(value)
    return f"{shown} {unit}" if unit and unit != "before clipping" else shown


def significant(value: float) -> str:
    """Return four digits of a number, whole ones with separators."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}"


def bytes_text(value: float) -> str:
    """Return bytes in the unit that leaves one to three digits before the point."""
    exponent = min(max(int(math.log10(abs(value) or 1)) // 3, 0), len(BYTE_UNITS) - 1)
    return f"{value / 1000**exponent:.{0 if exponent == 0 else 2}f} {BYTE_UNITS[exponent]}"


def duration_text(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def share_text(value: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * value:.1f} %"


def axis_unit(unit: str) -> str:
    """Return the unit that an axis prints."""
    return {"bytes": "GB", "share": "%"}.get(unit, unit)


def setting_text(value: Any) -> str:
    """Return the value of a setting as YAML writes it on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {setting_text(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(setting_text(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
