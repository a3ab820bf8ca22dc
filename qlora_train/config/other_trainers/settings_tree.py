"""Settings by their dotted names as nested mappings, and as the nodes of a config."""

import re
from itertools import pairwise
from typing import Any

from qlora_train.config.source_location import SourceLocation
from qlora_train.config.yaml_reader import Node


def place(config: dict[str, Any], setting: str, value: Any) -> None:
    """Put the value of a setting such as `data.train[0].path` into nested mappings and lists."""
    parts = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", setting)]
    holder: Any = config
    for part, following in pairwise(parts):
        if isinstance(holder, list):
            while len(holder) <= int(part):
                holder.append({})
            holder = holder[int(part)]
        else:
            holder = holder.setdefault(part, [] if isinstance(following, int) else {})
    holder[parts[-1]] = value


def as_tuples(value: Any) -> Any:
    """Return lists as tuples, as the config reader builds them."""
    if isinstance(value, dict):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value


def as_node(value: Any) -> Node:
    """Return the tree of nodes that validation errors are located in."""
    location = SourceLocation("converted", 1)
    if isinstance(value, dict):
        return Node({str(key): as_node(item) for key, item in value.items()}, location)
    return Node([as_node(item) for item in value] if isinstance(value, list) else value, location)
