"""Compare the settings and metadata of a resumed run with its start; name each difference and its consequence."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_train.config import RunConfig, load_config
from qlora_train.config.absolute_paths import with_absolute_paths
from qlora_train.config.resume_policy import FIXED_SHAPE, effect_of, flat_settings, is_mutable
from qlora_train.config.writer import to_yaml
from qlora_train.runs.run_folder import RunFolder, write_json
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import CheckpointError


@dataclass(frozen=True)
class Change:
    """A setting or metadata field that differs from the start of the run, or from the last accepted change."""

    key: str
    before: Any
    now: Any


def critical_changes(run: RunFolder, config: RunConfig) -> list[Change]:
    """Return the changed settings that affect what the run trains."""
    recorded = flat_settings(load_config(run.config_file).model_dump(mode="json"))
    current = flat_settings(with_absolute_paths(config).model_dump(mode="json"))
    return [change for change in _differences(recorded, current) if not is_mutable(change.key)]


def check_same_settings(run: RunFolder, config: RunConfig) -> None:
    """Refuse changed settings that `run.allow_changed` does not name.

    Raises:
        CheckpointError: one line per setting, with both values and the consequence.
    """
    _refuse(run, critical_changes(run, config), config.run.allow_changed)


def check_same_metadata(run: RunFolder, metadata: Mapping[str, Any]) -> None:
    """Refuse changed metadata fields.

    Raises:
        CheckpointError: one line per field, with both values and the consequence.
    """
    _refuse(run, _changed_metadata(run, metadata), ())


def record_metadata(run: RunFolder, config: RunConfig, metadata: Mapping[str, Any]) -> None:
    """Write run.json when a run starts; when it resumes, compare with it and record the allowed changes.

    Raises:
        CheckpointError: a change that `run.allow_changed` does not name.
    """
    recorded = run.metadata()
    if not recorded:
        write_json(run.metadata_file, {"run_id": uuid.uuid4().hex, **metadata, "changes": []})
        return
    changes = [*critical_changes(run, config), *_changed_metadata(run, metadata)]
    _refuse(run, changes, config.run.allow_changed)
    if changes:
        step = (run.checkpoint_steps() or [0])[-1]
        entries = [{"after_step": step, **asdict(change)} for change in changes]
        # the list of changes comes first: with it, the old adapter no longer counts as the run's result
        write_json(run.metadata_file, {**recorded, **metadata, "changes": [*recorded["changes"], *entries]})
        atomic_io.write_text(run.config_file, to_yaml(with_absolute_paths(config)))


def _changed_metadata(run: RunFolder, metadata: Mapping[str, Any]) -> list[Change]:
    recorded = run.metadata()
    changes = _differences({key: recorded.get(key) for key in metadata}, metadata)
    if any(change.key == "world_size" for change in changes):
        return [change for change in changes if change.key != "num_threads"]  # sums are split by processes too
    return changes


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the differences; those of mappings are named entry by entry."""
    found: list[Change] = []
    for key in now:
        old, new = before.get(key), now[key]
        if isinstance(old, dict) and isinstance(new, dict):
            entries = sorted(old.keys() | new.keys())
            found += [Change(f"{key}.{entry}", old.get(entry), new.get(entry)) for entry in entries]
        else:
            found.append(Change(key, old, new))
    return [change for change in found if change.before != change.now]


def _refuse(run: RunFolder, changes: Sequence[Change], allowed: Sequence[str]) -> None:
    problems = [_describe(run, change) for change in changes if not _is_allowed(change.key, allowed)]
    if problems:
        raise CheckpointError(problems)


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return (
        key == "world_size" or key in allowed or key.partition(".")[0] in allowed or key.rpartition(".")[0] in allowed
    )


def _describe(run: RunFolder, change: Change) -> str:
    key = change.key
    if key in FIXED_SHAPE:
        effect, remedy = "checkpoints of this run do not fit it", "set it back"
    else:
        # mappings are allowed as a whole
        name = key.partition(".")[0] if key.startswith("versions.") else ".".join(key.split(".")[:2])
        effect, remedy = effect_of(key), f"set it back, accept that with 'run.allow_changed=[{name}]'"
    return (
        f"{run.path}: {key} was {_shown(change.before)} when this run began and is {_shown(change.now)} now: {effect}; "
        f"{remedy} or choose another run.output_dir for a new run"
    )


def _shown(value: Any) -> str:
    return "unset" if value is None else repr(value)
