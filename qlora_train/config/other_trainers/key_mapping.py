"""Rows of the tables of other trainers: what one of their keys is here, and what its value becomes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Found:
    """A key of another trainer's config.

    Attributes:
        value: its value.
        beside: the mapping that holds it, for example one data set of a list.
        config: the whole config, as the trainer reads it.
        around: the mapping that holds `beside`.
    """

    value: Any
    beside: Mapping[str, Any]
    config: Mapping[str, Any]
    around: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """Settings of ours (`section.key`) that one key of theirs decides, and how their meaning differs, if it does.

    With `todo`, the config needs an edit before it trains what was meant.
    """

    values: Mapping[str, Any]
    note: str = ""
    todo: bool = False


@dataclass(frozen=True)
class Lost:
    """A value that cannot be carried over; with `todo`, the config needs an edit before it trains what was meant."""

    reason: str
    todo: bool = False


@dataclass(frozen=True)
class Unneeded:
    """A value that changes nothing here."""

    reason: str


Convert = Callable[[Found], Any]
"""Returns the value for the row's setting, or one of the three above."""


@dataclass(frozen=True)
class KeyMapping:
    """One row.

    Attributes:
        setting: ours, or empty if there is none. `data.train[].format` is a key of one source.
        convert: changes the value; it is the same if unset.
        note: how the setting's meaning differs; without a setting, why there is none.
        remark: what a user should know who writes the setting by hand.
        needed: False if nothing is lost without a setting.
    """

    setting: str = ""
    convert: Convert | None = None
    note: str = ""
    remark: str = ""
    needed: bool = True

    def hint(self) -> str:
        """Return the answer for an error about the key."""
        if not self.setting:
            return f"{'not supported' if self.needed else 'not needed'}: {self.note}"
        setting, note = self.setting.partition("[0]")[0], self.note or self.remark
        return f"here it is {setting}{f' ({note})' if note else ''}"


def to(
    setting: str, convert: Convert | Lost | Unneeded | None = None, note: str = "", *, remark: str = ""
) -> KeyMapping:
    """Return the row of a key that a setting of ours replaces, perhaps with another value, or without the value."""
    return KeyMapping(setting, convert if convert is None or callable(convert) else lambda _: convert, note, remark)


def lost(reason: str) -> KeyMapping:
    """Return the row of a key without an equivalent."""
    return KeyMapping(note=reason)


def unneeded(reason: str) -> KeyMapping:
    """Return the row of a key that changes nothing here."""
    return KeyMapping(note=reason, needed=False)


@dataclass(frozen=True)
class OtherTrainer:
    """Another trainer.

    Attributes:
        name: as in `--from`.
        title: as people write it.
        keys: their dotted keys, `[]` for an item of a list, or patterns with `*`, and what each is here.
        defaults: settings of ours with the value that the trainer has where its config is silent, or a function of it.
        absent: keys without which the trainer does something else than we do.
        programs: words of its command lines.
    """

    name: str
    title: str
    keys: Mapping[str, KeyMapping]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Lost] = field(default_factory=dict)
    programs: tuple[str, ...] = ()

    def mapping_of(self, key: str) -> KeyMapping | None:
        """Return the row of a dotted key, or of the first pattern that matches it."""
        if key in self.keys:
            return self.keys[key]
        for pattern, row in self.keys.items():
            begin, star, end = pattern.partition("*")
            if star and key.startswith(begin) and key.endswith(end) and len(key) >= len(begin) + len(end):
                return row
        return None

    @cached_property
    def below(self) -> Mapping[str, Sequence[KeyMapping]]:
        """Rows of the keys inside each mapping or list."""
        return _grouped((parent, row) for key, row in self.keys.items() for parent in _parents(key))

    @cached_property
    def by_last_part(self) -> Mapping[str, Sequence[KeyMapping]]:
        """Rows of nested keys by the part after their last dot."""
        return _grouped((key.rpartition(".")[2], row) for key, row in self.keys.items() if "." in key)


def _parents(key: str) -> Iterator[str]:
    parts = key.split(".")
    for length in range(1, len(parts)):
        parent = ".".join(parts[:length])
        yield from {parent, parent.removesuffix("[]")}


def _grouped(pairs: Iterable[tuple[str, KeyMapping]]) -> dict[str, list[KeyMapping]]:
    """Group rows by name, those with a setting here first."""
    groups: dict[str, list[KeyMapping]] = {}
    for name, row in pairs:
        groups.setdefault(name, []).append(row)
    return {name: sorted(rows, key=lambda row: not row.setting) for name, rows in groups.items()}
