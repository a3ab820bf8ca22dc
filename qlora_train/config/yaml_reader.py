"""YAML text as a tree of nodes with source locations and the scalars of YAML 1.2's core schema.

PyYAML's constructors follow YAML 1.1 (`no` is False, `010` is 8, `2e-4` is a string) and lose line numbers, so the tree is
built from its parser events. Anchors, aliases, merge keys, tags, duplicate keys and several documents are errors.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from qlora_train.config.source_location import Problem, SourceLocation

MAX_DEPTH = 12
MAX_DIGITS = 400
NUMBER_LIKE = re.compile(r"[-+]?\.?[0-9][0-9.eE+-]*|0x[0-9a-fA-F]+|0o[0-7]+")
NULL = re.compile(r"null|Null|NULL|~|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
NUMBERS: tuple[tuple[re.Pattern[str], Callable[[str], int | float]], ...] = (
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda _: float("nan")),
)

UNUSUAL_SPACE = re.compile(r"[^\S \t\r\n]|[\u200b\u2060\ufeff]")
"""White space that is a letter in YAML, as pasted from web pages."""
BLOCK_STYLES = ("|", ">")

SYNTAX_HINTS = {
    "outside quotes": "use plain spaces, or put the text in quotes",
    r"'\t'": "indent with spaces, not with a tab",
    "but found ':'": "write a name before the colon",
    "expected <block end>": "check the indentation: keys of a section begin in the same column",
    "could not find expected ':'": "write key: value, with a colon and a space",
    "mapping values are not allowed here": "a line before lacks its colon, or a text that holds ': ' its quotes",
    "expected ',' or": "close the list or mapping before this line",
    "while scanning a quoted scalar": "close the quotes",
    "nested more than": "a config is flat",
}

Scalar = str | int | float | bool | None


@dataclass
class Node:
    """A scalar, a dict of nodes or a list of nodes, with the line of its key (in a list, of the item)."""

    value: Any
    location: SourceLocation

    def plain(self) -> Any:
        """Return the value as dicts, tuples and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return tuple(child.plain() for child in self.value)
        return self.value

    def child(self, key: str | int) -> "Node | None":
        """Return the node under a key or index, or None."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            found: Node = self.value[key]
            return found
        return None

    def descendant(self, path: Sequence[str | int]) -> "Node | None":
        """Return the node under a path of keys and indices, or None."""
        node: Node | None = self
        for key in path:
            node = node.child(key) if node else None
        return node


def core_scalar(text: str) -> Scalar:
    """Return the value of an unquoted scalar in the core schema, https://yaml.org/spec/1.2.2/#103-core-schema."""
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    for pattern, convert in NUMBERS:
        if pattern.fullmatch(text):
            return convert(text)
    return text


@dataclass
class TreeBuilder:
    """Builds nodes from parser events and collects problems; `path` names the node being built."""

    events: Iterator[yaml.Event]
    location_at: Callable[[int], SourceLocation]
    problems: list[Problem] = field(default_factory=list)
    path: list[str] = field(default_factory=list)

    def build(self, event: Any, line: int, depth: int = 0) -> Node:
        location = self.location_at(line)
        if depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=event.start_mark)
        self._refuse_indirection(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return Node(self._items(depth), location)
        if isinstance(event, yaml.MappingStartEvent):
            return Node(self._entries(depth), location)
        if isinstance(event, yaml.ScalarEvent):
            return Node(self._scalar(event), location)
        return Node(None, location)

    def _refuse_indirection(self, event: Any) -> None:
        line = _line(event)
        if isinstance(event, yaml.AliasEvent):
            self._problem(line, f"alias *{event.anchor} is not allowed; write the value out")
            return
        if event.anchor:
            self._problem(line, f"anchor &{event.anchor} is not allowed; write the value where it is used")
        if event.tag:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._problem(line, f"tag {tag} is not allowed; remove it (quotes make a string)")

    def _scalar(self, event: yaml.ScalarEvent) -> Scalar:
        text = event.value
        if event.style in BLOCK_STYLES:
            return str(text).rstrip("\n")  # ends the block; no path, name or expression has one
        if not event.implicit[0]:
            return str(text)
        if space := UNUSUAL_SPACE.search(text):
            name = unicodedata.name(space.group(), "an invisible character").lower()
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(problem=f"U+{ord(space.group()):04X} ({name}) outside quotes", problem_mark=mark)
        if len(text) > MAX_DIGITS and NUMBER_LIKE.fullmatch(text):
            self._problem(_line(event), f"a number of {len(text)} characters; at most {MAX_DIGITS}")
            return None
        return core_scalar(text)

    def _items(self, depth: int) -> list[Node]:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.build(event, _line(event), depth + 1))
        return items

    def _entries(self, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        first_lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            line = _line(event)
            key = self._key(event, line, depth)
            num_problems = len(self.problems)
            self.path.append(key or "")
            value = self.build(next(self.events), line, depth + 1)
            if key is None:
                del self.problems[num_problems:]  # one error per key is enough
            elif key in entries:
                self._problem(line, f"given a second time (first on line {first_lines[key]}); keep one of them")
            else:
                entries[key], first_lines[key] = value, line
            self.path.pop()
        return entries

    def _key(self, event: Any, line: int, depth: int) -> str | None:
        node = self.build(event, line, depth + 1)
        if isinstance(event, yaml.AliasEvent):
            return None
        if not isinstance(event, yaml.ScalarEvent):
            self._problem(line, "a list or mapping as a key is not allowed; a key is a name")
            return None
        if event.value == "<<" and event.implicit[0]:
            self._problem(line, "merge key << is not allowed; write the values out")
            return None
        if node.value is None and not event.value:
            self._problem(line, "a value without a key; write it as key: value")
            return None
        return str(event.value)

    def _problem(self, line: int, text: str) -> None:
        self.problems.append(Problem(self.location_at(line), ".".join(self.path), text))


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1


def read_yaml(text: str, location_at: Callable[[int], SourceLocation]) -> tuple[Node, list[Problem]]:
    """Return the tree of the document in `text` and its problems; after a syntax error the tree is empty.

    Args:
        location_at: maps a line number, counted from 1, to a source location.
    """
    builder = TreeBuilder(iter(()), location_at)
    try:
        builder.events = yaml.parse(text, Loader=yaml.SafeLoader)
        root = _read_document(builder)
    except yaml.YAMLError as error:
        return Node(None, location_at(1)), [*builder.problems, _syntax_problem(error, text, location_at)]
    return root, builder.problems


def _read_document(builder: TreeBuilder) -> Node:
    root: Node | None = None
    for event in builder.events:
        if isinstance(event, yaml.DocumentStartEvent):
            if root is not None:
                location = builder.location_at(_line(event))
                builder.problems.append(Problem(location, "", "a second document begins; a config is one document"))
                break
            first = next(builder.events)
            root = builder.build(first, _line(first))
    return root or Node(None, builder.location_at(1))


def _syntax_problem(error: yaml.YAMLError, text: str, location_at: Callable[[int], SourceLocation]) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem(location_at(line), "", f"character U+{error.character:04X} is not allowed in YAML; remove it")
    assert isinstance(error, yaml.MarkedYAMLError)
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    detail = ", ".join(part for part in (error.context, error.problem) if part)
    hint = next((hint for words, hint in SYNTAX_HINTS.items() if words in detail), "check quotes and brackets here")
    return Problem(location_at(line), "", f"not valid YAML ({detail}); {hint}")
