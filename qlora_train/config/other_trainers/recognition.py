"""Which trainer a config is for: the one that alone knows most of its keys."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_train.config.other_trainers.all_trainers import OTHER_TRAINERS
from qlora_train.config.other_trainers.key_mapping import KeyMapping, OtherTrainer

MAX_DEPTH = 12
MIN_KNOWN_KEYS = 3
MIN_KNOWN_SHARE = 0.6


@dataclass(frozen=True)
class Leaf:
    """A value of another trainer's config.

    Attributes:
        key: dotted, `[]` for an item of a list, as in the tables.
        path: the same with indices.
        beside: the mapping that holds it.
        around: the mapping that holds `beside`.
        row: what it is here; None if the trainer has no such key.
    """

    key: str
    path: str
    value: Any
    beside: Mapping[str, Any]
    around: Mapping[str, Any]
    row: KeyMapping | None


def leaves(trainer: OtherTrainer, config: Mapping[str, Any]) -> Iterator[Leaf]:
    """Yield the values of a config in its order; a mapping that the trainer's table knows as a whole is one value."""
    for key, value in config.items():
        yield from _below(trainer, Leaf(str(key), str(key), value, config, {}, trainer.mapping_of(str(key))))


def _below(trainer: OtherTrainer, leaf: Leaf, depth: int = 0) -> Iterator[Leaf]:
    value, has_rows = leaf.value, leaf.key in trainer.below
    if isinstance(value, Mapping) and value and depth < MAX_DEPTH and (has_rows or leaf.row is None):
        for name, inner in value.items():
            key, path = f"{leaf.key}.{name}", f"{leaf.path}.{name}"
            yield from _below(trainer, Leaf(key, path, inner, value, leaf.beside, trainer.mapping_of(key)), depth + 1)
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value) and has_rows:
        for index, item in enumerate(value):
            inner_leaf = Leaf(f"{leaf.key}[]", f"{leaf.path}[{index}]", item, leaf.beside, {}, None)
            yield from _below(trainer, inner_leaf, depth + 1)
    else:
        yield leaf


def recognise(config: Mapping[str, Any]) -> list[OtherTrainer]:
    """Return the trainers whose config it may be, the likeliest first; several if they are equally likely."""
    scores = {trainer.name: _score(trainer, config) for trainer in OTHER_TRAINERS.values()}
    best = max(scores.values())
    return [OTHER_TRAINERS[name] for name, score in scores.items() if score == best and score > 0]


def is_clearly_of(trainer: OtherTrainer, config: Mapping[str, Any]) -> bool:
    """Tell whether several keys, and most of them, are the trainer's, and it is no config of ours with a few of them."""
    model = config.get("model")
    if isinstance(model, Mapping) and "model_name_or_path" in model:
        return False
    return _num_known(trainer, config) >= MIN_KNOWN_KEYS and is_mostly_of(trainer, config)


def is_mostly_of(trainer: OtherTrainer, config: Mapping[str, Any]) -> bool:
    """Tell whether most keys are the trainer's."""
    return _num_known(trainer, config) >= MIN_KNOWN_SHARE * sum(1 for _ in leaves(trainer, config))


def _num_known(trainer: OtherTrainer, config: Mapping[str, Any]) -> int:
    return sum(leaf.row is not None for leaf in leaves(trainer, config))


def _score(trainer: OtherTrainer, config: Mapping[str, Any]) -> float:
    """Count the keys that the trainer knows, each divided by the number of trainers that know it."""
    known = [leaf.key for leaf in leaves(trainer, config) if leaf.key in trainer.keys]
    return sum(1 / sum(key in other.keys for other in OTHER_TRAINERS.values()) for key in known)
