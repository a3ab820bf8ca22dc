"""Where a value was written, and a problem said about it in one line."""

from dataclasses import dataclass

from qlora_train.utils.secrets import redact


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """A line, from 1, of a file, or an override (`source` is then ``override section.key=value``, without a line)."""

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
    """What is wrong with the value called `name` (`section.key`, or empty for the file as a whole)."""

    place: SourceLocation
    name: str
    text: str

    def __str__(self) -> str:
        named_by_place = not self.name or self.place.source.startswith(f"override {self.name}=")
        line = f"{self.place}: {self.text}" if named_by_place else f"{self.place}: {self.name}: {self.text}"
        return redact(" ".join(line.splitlines()))  # a quoted key may hold a line break
