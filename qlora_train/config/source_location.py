"""Where a value of the config was written, and a problem with it in one line."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_train.utils.secrets import redact

SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """A line of a file, counted from 1, or an override (`override section.key=value`, without a line)."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"

    @property
    def order(self) -> tuple[bool, int]:
        """Sort key: lines of the file first, then overrides."""
        return self.line is None, self.line or 0


@dataclass(frozen=True, slots=True)
class Problem:
    """An error in the value of `name` (`section.key`, or empty for the whole file)."""

    location: SourceLocation
    name: str
    text: str

    def __str__(self) -> str:
        named = not self.name or self.location.source.startswith(f"override {self.name}=")
        line = f"{self.location}: {self.text}" if named else f"{self.location}: {self.name}: {self.text}"
        return redact(" ".join(line.splitlines()))  # a quoted key may hold a line break


def found_value(value: Any) -> str:
    """Return a value for a message: as YAML, shortened."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
