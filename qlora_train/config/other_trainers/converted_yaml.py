"""Write a conversion: a YAML file whose comments name the keys of the other trainer, and a list of what differs."""

import re
import textwrap
from collections.abc import Iterator, Sequence

from qlora_train.config.allowed_values import valid_keys
from qlora_train.config.other_trainers.conversion import Conversion, Converted, Item
from qlora_train.config.schema import RunConfig
from qlora_train.config.writer import inline_yaml
from qlora_train.utils.secrets import redact
from qlora_train.utils.visible_text import visible

WIDTH = 120
COMMENTS = textwrap.TextWrapper(
    WIDTH, initial_indent="# ", subsequent_indent="#     ", break_long_words=False, break_on_hyphens=False
)
SHOWN_CHARACTERS = 60
SECRET_KEY = re.compile(r"((hf|hub|wandb|access|auth|swanlab)_token|api_key|secret|password)$", re.IGNORECASE)


def to_yaml(result: Conversion, source: str) -> str:
    """Return the config with a comment for each value, and the lists as comments at the end."""
    lines = [
        f"# Converted from {printable(source)}, a config of {result.trainer.title}: each comment names its key there."
    ]
    lines += _comments("To do: ", item_lines(result.todo))
    for section in RunConfig.model_fields:
        entries = list(_section_lines(result, section))
        if entries:
            lines += ["", f"{section}:", *entries]
    for title, items in lists(result):
        if title != "To do":
            lines += ["", f"# {title}:", *_comments("  ", item_lines(items))]
    if result.unset:
        lines += ["", *_comments("", [unset_line(result)])]
    return "\n".join(lines) + "\n"


def _comments(begin: str, texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        yield from COMMENTS.wrap(begin + text)


def unset_line(result: Conversion) -> str:
    """Return the keys that are null, false or empty, and change nothing."""
    return f"Unset, false or empty there: {', '.join(printable(key) for key in result.unset)}"


def defaults_line(result: Conversion) -> str:
    """Return the settings that no key of theirs decided; empty if there are none."""
    written = {
        setting: inline_yaml(converted.value) for setting, converted in result.settings.items() if not converted.keys
    }
    if not written:
        return ""
    listed = ", ".join(f"{setting}: {value}" for setting, value in written.items())
    return f"{result.trainer.title}'s defaults, written down: {listed}"


def lists(result: Conversion) -> list[tuple[str, Sequence[Item]]]:
    """Return the lists that are not empty, with their titles."""
    named = (
        ("To do", result.todo), ("Different in meaning", result.differs), ("Not carried over", result.lost),
        ("Not needed here", result.unneeded),
    )  # fmt: skip
    return [(title, items) for title, items in named if items]


def item_lines(items: Sequence[Item]) -> list[str]:
    """Return `key: value; text` per item."""
    return [
        "; ".join((": ".join(part for part in (printable(item.key), shown(item)) if part), printable(item.text)))
        for item in items
    ]


def shown(item: Item) -> str:
    """Return a value for a list, shortened, without secrets."""
    if item.value is None:
        return ""
    if SECRET_KEY.search(item.key):
        return "[secret]"
    text = redact(inline_yaml(item.value))
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def printable(text: str) -> str:
    """Return a text on one line, without control characters and secrets."""
    return redact(visible(text))


def _section_lines(result: Conversion, section: str) -> Iterator[str]:
    for key in valid_keys((section,)):
        setting = f"{section}.{key}"
        sources = [name for name in result.settings if name.startswith(f"{setting}[")]
        if sources:
            yield f"  {key}:"
            yield from _source_lines(result, sources)
        elif converted := result.settings.get(setting):
            yield from _entry_lines("  ", key, converted, result)
        elif below := [name for name in result.settings if name.startswith(f"{setting}.")]:
            yield from _entry_lines("  ", key, _merged(result, below, setting), result)


def _source_lines(result: Conversion, names: Sequence[str]) -> Iterator[str]:
    """Yield the items of a list of sources, their keys in the schema's order."""
    indices = sorted({int(re.findall(r"\[(\d+)\]", name)[0]) for name in names})
    for index in indices:
        begin = "    - "
        for key in valid_keys(("data", "train", 0)):
            own = [name for name in names if re.search(rf"\[{index}\]\.{key}(\.|$)", name)]
            if own:
                setting = f"{own[0].partition(']')[0]}].{key}"
                converted = result.settings.get(setting) or _merged(result, own, setting)
                yield from _entry_lines(begin, key, converted, result)
                begin = "      "


def _merged(result: Conversion, names: Sequence[str], setting: str) -> Converted:
    """Return the keys of a mapping, such as `columns`, as one setting."""
    entries = {name.removeprefix(f"{setting}."): result.settings[name] for name in names}
    keys = list(dict.fromkeys(key for converted in entries.values() for key in converted.keys))
    return Converted({name: converted.value for name, converted in entries.items()}, keys)


def _entry_lines(begin: str, key: str, converted: Converted, result: Conversion) -> Iterator[str]:
    """Yield `key: value  # comment`, with the comment above where the line would be too long."""
    name = result.trainer.name
    comment = (
        f"{name}: {', '.join(printable(each) for each in converted.keys)}" if converted.keys else f"{name}'s default"
    )
    comment += f" ({printable(converted.note)})" if converted.note else ""
    entry = f"{begin}{key}: {inline_yaml(converted.value)}"
    if len(entry) + len(comment) + 4 <= WIDTH:
        yield f"{entry}  # {comment}"
    elif begin.strip():  # the first key of a list item: a comment above would stand before the dash
        yield f"{' ' * (len(begin) - 2)}# {comment}"
        yield entry
    else:
        yield f"{begin}# {comment}"
        yield entry
