"""Write the resolved config: as YAML that loads as an equal `RunConfig`, or as settings with their sources."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from qlora_train.config.reader import load_with_locations
from qlora_train.config.schema import RunConfig
from qlora_train.config.yaml_reader import UNUSUAL_SPACE, Node, core_scalar
from qlora_train.utils.visible_text import visible

STRING_TAG = "tag:yaml.org,2002:str"
QUOTED_TAG = "tag:yaml.org,2002:null"


class CoreDumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would load as another type, and escapes line breaks."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Return the tag that `value` would be loaded with; PyYAML quotes a string with another tag."""
        tag = super().resolve(kind, value, implicit)
        if tag == STRING_TAG and kind is yaml.ScalarNode and implicit[0] and not isinstance(core_scalar(value), str):
            return QUOTED_TAG
        return tag

    def ignore_aliases(self, data: Any) -> bool:
        """Never write aliases, which the reader refuses."""
        return True


def _represent_text(dumper: CoreDumper, text: str) -> yaml.ScalarNode:
    # inside single quotes YAML folds a line break into a space
    plain = len(f"{text}.".splitlines()) == 1 and not UNUSUAL_SPACE.search(text)
    return dumper.represent_scalar(STRING_TAG, text, style=None if plain else '"')


CoreDumper.add_representer(str, _represent_text)


@dataclass(frozen=True)
class Setting:
    """One resolved value: `source` is ``file:line``, ``override section.key=value`` or ``default``."""

    key: str
    value: Any
    source: str


def to_yaml(config: RunConfig) -> str:
    """Return the config with every value, defaults included."""
    sections = {name: _plain(getattr(config, name)) for name in RunConfig.model_fields}
    return "\n".join(
        yaml.dump({name: values}, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=120)
        for name, values in sections.items()
    )


def inline_yaml(value: Any) -> str:
    """Return a value as YAML on one line; with invisible characters, which could steer a terminal, as escapes."""
    text = _inline(value, allow_unicode=True)
    return text if visible(text) == text else _inline(value, allow_unicode=False)


def _inline(value: Any, *, allow_unicode: bool) -> str:
    text = yaml.dump(
        _plain(value),
        Dumper=CoreDumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=allow_unicode,
        width=10**9,
    )
    return str(text).removesuffix("...\n").strip()


def provenance(path: str | Path, overrides: Sequence[str] = ()) -> list[Setting]:
    """Return every setting of a config with its source, in the order of the schema.

    Raises:
        ConfigError: as `load_config`.
    """
    config, root = load_with_locations(path, overrides)
    return list(_settings(config, root))


def _settings(config: RunConfig, root: Node) -> Iterator[Setting]:
    for section_name in RunConfig.model_fields:
        section = getattr(config, section_name)
        written = root.child(section_name)
        for key in type(section).model_fields:
            node = written.child(key) if written else None
            yield Setting(
                f"{section_name}.{key}", _plain(getattr(section, key)), str(node.location) if node else "default"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
