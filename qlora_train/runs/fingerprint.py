"""What decides a run, compared between its parts: settings and facts, each difference named with what it would do."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_train.utils import atomic_io
from qlora_train.runs.run_folder import RunFolder
from qlora_train.config import RunConfig, load_config
from qlora_train.config.absolute_paths import with_absolute_paths
from qlora_train.config.resume_policy import FIXED_SHAPE, effect_of, flat_settings, is_mutable
from qlora_train.config.writer import to_yaml
from qlora_train.utils.errors import CheckpointError


@dataclass(frozen=True)
class Change:
    """A setting or fact that differs from when the run began, or from the last change that was accepted."""

    key: str
    before: Any
    now: Any


def changed_settings(run: RunFolder, config: RunConfig) -> list[Change]:
    """Return the settings that decide a run and differ from those that it was begun with."""
    items = load_config(run.config_file), with_absolute_paths(config)
    before, now = (flat_settings(item.model_dump(mode="json")) for item in items)
    return [change for change in _differences(before, now) if not is_mutable(change.key)]


def check_same_settings(run: RunFolder, config: RunConfig) -> None:
    """Refuse to go on with a run whose settings have changed, but for what `run.allow_changed` names.

    Raises:
        CheckpointError: one line a setting, with the old and the new value and what the change would do.
    """
    _refuse(run, changed_settings(run, config), config.run.allow_changed)


def check_same_metadata(run: RunFolder, facts: Mapping[str, Any]) -> None:
    """Refuse to go on with a run some of whose facts have changed.

    Args:
        run: the run.
        facts: those to compare, by name; JSON values.

    Raises:
        CheckpointError: one line a fact, with the old and the new value and what the change would do.
    """
    _refuse(run, _changed_facts(run, facts), ())


def record_metadata(run: RunFolder, config: RunConfig, facts: Mapping[str, Any]) -> None:
    """Record what decides a run when it begins; compare it when it goes on, and record the changes that are allowed.

    Args:
        run: the run.
        config: its settings now.
        facts: what decides it besides its settings, by name; JSON values.

    Raises:
        CheckpointError: something has changed that `run.allow_changed` does not name.
    """
    recorded = run.metadata()
    if not recorded:
        _write(run, {"run_id": uuid.uuid4().hex, **facts, "changes": []})
        return
    changes = [*changed_settings(run, config), *_changed_facts(run, facts)]
    _refuse(run, changes, config.run.allow_changed)
    if changes:
        step = (run.checkpoint_steps() or [0])[-1]
        entries = [{"after_step": step, **asdict(change)} for change in changes]
        # first the list of changes: from then on the old adapter no longer counts as the result
        _write(run, {**recorded, **facts, "changes": [*recorded["changes"], *entries]})
        atomic_io.write_text(run.config_file, to_yaml(with_absolute_paths(config)))


def _write(run: RunFolder, facts: Mapping[str, Any]) -> None:
    atomic_io.write_text(run.metadata_file, json.dumps(facts, indent=2) + "\n")


def _changed_facts(run: RunFolder, facts: Mapping[str, Any]) -> list[Change]:
    recorded = run.metadata()
    return _differences({key: recorded.get(key) for key in facts}, facts)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return what differs, entry by entry where both are mappings of names to plain values."""
    found = []
    for key in now:
        old, new = before.get(key), now[key]
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            names = sorted(old.keys() | new.keys())
            found += [
                Change(f"{key}.{name}", old.get(name), new.get(name))
                for name in names
                if old.get(name) != new.get(name)
            ]
        else:
            found.append(Change(key, old, new))
    return found


def _refuse(run: RunFolder, changes: Sequence[Change], allowed: Sequence[str]) -> None:
    problems = [_line(run, change) for change in changes if not _is_allowed(change.key, allowed)]
    if problems:
        raise CheckpointError(problems)


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return key in allowed or key.partition(".")[0] in allowed or key.rpartition(".")[0] in allowed


def _line(run: RunFolder, change: Change) -> str:
    ways = ["set it back", "choose another run.output_dir for a new run"]
    if change.key not in FIXED_SHAPE:
        ways.insert(1, f"accept that with run.allow_changed=[{_allowed_name(change.key)}]")
    effect = effect_of(change.key) if change.key not in FIXED_SHAPE else "checkpoints of this run do not fit it"
    return (
        f"{run.path}: {change.key} was {change.before!r} when this run began and is {change.now!r} now: {effect}; "
        f"{', '.join(ways[:-1])} or {ways[-1]}"
    )


def _allowed_name(key: str) -> str:
    """Return the name to allow: facts that are mappings are allowed as a whole, and so are settings that are."""
    return key.partition(".")[0] if key.startswith("versions.") else ".".join(key.split(".")[:2])
