"""A config holds no secrets: it is saved with every run, quoted in messages and shared with cards.

This is looked at before anything else is said about a value, since what is said quotes it.
"""

from collections.abc import Iterator, Sequence

from qlora_train.config.source_location import Problem, SourceLocation
from qlora_train.config.yaml_reader import Node
from qlora_train.utils.secrets import redact, secret_error


def secrets_in(node: Node, name: str = "") -> Iterator[Problem]:
    """Yield a problem for every text and every key of a tree that holds a secret."""
    if isinstance(node.value, str) and (text := secret_error(node.value)):
        yield Problem(node.place, name, text)
    elif isinstance(node.value, dict):
        for key, child in node.value.items():
            if text := secret_error(key):
                yield Problem(child.place, name, f"a key {text}")
            yield from secrets_in(child, f"{name}.{redact(key)}" if name else redact(key))
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            yield from secrets_in(child, f"{name}[{index}]")


def secrets_typed(path: str, overrides: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for every override that holds a secret, named by its key alone, and for the config's own name."""
    if text := secret_error(path):
        yield Problem(SourceLocation("the name of the config file"), "", text)
    for override in overrides:
        if text := secret_error(override):
            key = redact(" ".join(override.partition("=")[0].split()))
            yield Problem(SourceLocation(f"override {key}"), "", text)
