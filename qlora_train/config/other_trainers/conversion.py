"""Convert another trainer's config: settings of ours with their origin, and what was not carried over, and why."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from qlora_train.config.allowed_values import choices, takes_any_text
from qlora_train.config.other_trainers.key_mapping import Found, Lost, OtherTrainer, Settings, Unneeded
from qlora_train.config.other_trainers.other_config_file import OtherConfig
from qlora_train.config.other_trainers.recognition import Leaf, leaves
from qlora_train.config.other_trainers.settings_tree import as_node, as_tuples, place
from qlora_train.config.other_trainers.value_conversions import is_unset, number
from qlora_train.config.schema import RunConfig
from qlora_train.config.validation_errors import problems_of

SOURCES = ("data.train", "data.eval")
ADDED_UP = ("run.report_to", "model.new_tokens")
"""Lists that several keys of theirs make together."""
SETTING = re.compile(r"[a-z]+\.[a-z_0-9]+")
BASE = "model.model_name_or_path"
STORED_IN_4BIT = re.compile(r"(-unsloth)?-bnb-4bit$")
"""End of the names of bases whose weights are stored in 4 bits."""
UNKNOWN = "not a key of {title} that is known here"


@dataclass
class Converted:
    """A setting of ours: its value, the keys of theirs that decided it, and how its meaning differs."""

    value: Any
    keys: list[str]
    note: str = ""


@dataclass(frozen=True)
class Item:
    """A key of theirs with its value, and what is to be said about it."""

    key: str
    value: Any
    text: str


@dataclass
class Conversion:
    """The result: our settings by `section.key` or `data.train[0].key`, and lists of keys, each in the file's order."""

    trainer: OtherTrainer
    settings: dict[str, Converted] = field(default_factory=dict)
    todo: list[Item] = field(default_factory=list)
    differs: list[Item] = field(default_factory=list)
    lost: list[Item] = field(default_factory=list)
    unneeded: list[Item] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Return the settings as the mapping that the config reader builds from YAML."""
        config: dict[str, Any] = {}
        for setting, converted in self.settings.items():
            place(config, setting, converted.value)
        return config


def convert(other: OtherConfig) -> Conversion:
    """Convert a config; what our schema refuses is moved to the lost ones, with its reason."""
    result = Conversion(other.trainer)
    decided: set[str] = set()
    for leaf in leaves(other.trainer, other.values):
        if _convert_leaf(result, leaf, other.values):
            decided.add(leaf.row.setting if leaf.row else "")
    for line in other.other_lines:
        result.lost.append(Item(line, None, "a command of the script that is not the trainer's"))
    for key, outcome in other.trainer.absent.items():
        is_decided = outcome.reason.partition(":")[0] in result.settings
        if is_unset(other.values.get(key)) and not is_decided:
            (result.todo if outcome.todo else result.differs).append(Item(f"{key} (unset)", None, outcome.reason))
    _add_defaults(result, other.values, decided)
    _expand_sources(result)
    _scale_accumulation(result)
    _align_checkpoints(result)
    _drop_refused(result)
    _mention_16bit_base(result)
    return result


def _convert_leaf(result: Conversion, leaf: Leaf, config: Mapping[str, Any]) -> bool:
    """Put a key into the settings or a list; return whether it says something about its setting."""
    row = leaf.row
    if is_unset(leaf.value) and (row is None or not row.setting or leaf.value is None):
        result.unset.append(leaf.path)
    elif row is None:
        result.lost.append(Item(leaf.path, leaf.value, UNKNOWN.format(title=result.trainer.title)))
    elif not row.setting or "." not in row.setting:
        (result.lost if row.needed else result.unneeded).append(Item(leaf.path, leaf.value, row.note or "not settings"))
    else:
        found = Found(leaf.value, leaf.beside, config, leaf.around)
        outcome = row.convert(found) if row.convert else leaf.value
        _add_outcome(result, leaf, outcome, row.setting, row.note)
        return not isinstance(outcome, Unneeded)
    return False


def _add_outcome(result: Conversion, leaf: Leaf, outcome: Any, setting: str, note: str) -> None:
    if isinstance(outcome, Lost):
        (result.todo if outcome.todo else result.lost).append(Item(leaf.path, leaf.value, outcome.reason))
        return
    if isinstance(outcome, Unneeded):
        result.unneeded.append(Item(leaf.path, leaf.value, outcome.reason))
        return
    values = outcome.values if isinstance(outcome, Settings) else {setting: outcome}
    note = outcome.note if isinstance(outcome, Settings) else note
    if isinstance(outcome, Settings) and outcome.todo:
        result.todo.append(Item(leaf.path, leaf.value, note))
    elif note:
        result.differs.append(Item(leaf.path, leaf.value, f"{setting.partition('[')[0]}: {note}"))
    if not values and not note:
        result.unneeded.append(Item(leaf.path, leaf.value, "the keys beside it say what it reads"))
    for target, value in values.items():
        _add_setting(result, leaf, _with_index(target, setting, leaf.path), value)


def _with_index(target: str, setting: str, path: str) -> str:
    """Return a setting of a source with the index of the data set that the key belongs to."""
    found = re.search(r"\[(\d+)\]", path)
    index = found[1] if found else "0"
    if target.startswith("[]"):
        target = setting.partition("[]")[0] + target
    return target.replace("[]", f"[{index}]")


def _add_setting(result: Conversion, leaf: Leaf, setting: str, value: Any) -> None:
    value = _coerced(setting, value)
    before = result.settings.get(setting)
    if before is None:
        result.settings[setting] = Converted(value, [leaf.path])
    elif before.value == value:
        before.keys.append(leaf.path)
    elif setting in ADDED_UP and isinstance(before.value, list) and isinstance(value, list):
        before.value += [name for name in value if name not in before.value]
        before.keys.append(leaf.path)
    else:
        result.lost.append(Item(leaf.path, leaf.value, f"{setting} is set already, by {before.keys[0]}"))


def _coerced(setting: str, value: Any) -> Any:
    """Return numbers and flags that are written as text as what the setting takes."""
    path = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", setting)]
    if isinstance(value, str) and not takes_any_text(path) and value not in choices(path):
        value = number(value)
    if isinstance(value, float) and value.is_integer() and "." not in str(value).removesuffix(".0"):
        value = int(value) if abs(value) >= 1 else value
    return list(value) if isinstance(value, tuple) else value


def _add_defaults(result: Conversion, config: Mapping[str, Any], decided: set[str]) -> None:
    """Set what the trainer does where its config is silent, if our default differs."""
    for setting, default in result.trainer.defaults.items():
        value = default(config) if callable(default) else default
        if setting in decided or setting in result.settings or value is None:
            continue
        if setting == "train.num_train_epochs" and "train.max_steps" in result.settings:
            continue
        note = value.note if isinstance(value, Settings) else ""
        value = value.values[setting] if isinstance(value, Settings) else value
        section, key = setting.split(".")
        if value != RunConfig.model_fields[section].annotation.model_fields[key].default:  # type: ignore[union-attr]
            result.settings[setting] = Converted(value, [], note)


def _expand_sources(result: Conversion) -> None:
    """Give every source an index: those of a whole list, and one for each of several files of a data set."""
    for name in SOURCES:
        groups: dict[int, dict[str, Converted]] = {}
        for setting in [key for key in result.settings if key.startswith(f"{name}[")]:
            index, _, key = setting.removeprefix(f"{name}[").partition("].")
            groups.setdefault(int(index), {})[key] = result.settings.pop(setting)
        whole = result.settings.get(name)
        if whole is not None and (groups or isinstance(whole.value, list | str)):
            del result.settings[name]
            first = max(groups, default=-1) + 1
            groups |= {
                first + offset: {key: Converted(value, whole.keys) for key, value in source.items()}
                for offset, source in enumerate(_as_sources(whole.value))
            }
        for position, source in enumerate(_one_path_each(groups)):
            result.settings |= {f"{name}[{position}].{key}": converted for key, converted in source.items()}


def _as_sources(value: Any) -> list[Mapping[str, Any]]:
    items = value if isinstance(value, list) else [value]
    return [item if isinstance(item, Mapping) else {"path": str(item)} for item in items]


def _one_path_each(groups: Mapping[int, dict[str, Converted]]) -> Iterator[dict[str, Converted]]:
    for _, source in sorted(groups.items()):
        path = source.get("path")
        if path is None or not isinstance(path.value, list):
            yield source
        else:
            yield from ({**source, "path": Converted(each, path.keys)} for each in path.value)


def _scale_accumulation(result: Conversion) -> None:
    """Count the micro-batches of all processes, if their number is known: there they are those of each."""
    processes, steps = (
        result.settings.get("parallel.processes"),
        result.settings.get("train.gradient_accumulation_steps"),
    )
    if (
        processes
        and steps
        and isinstance(processes.value, int)
        and isinstance(steps.value, int)
        and processes.value > 1
    ):
        note = f"{steps.value} of each of {processes.value} processes"
        result.settings["train.gradient_accumulation_steps"] = Converted(
            steps.value * processes.value, steps.keys, note
        )
        result.differs = [
            Item(item.key, item.value, f"train.gradient_accumulation_steps: {note}") if item.key in steps.keys else item
            for item in result.differs
        ]


def _align_checkpoints(result: Conversion) -> None:
    """Save a checkpoint at every evaluation, if the best one is asked for."""
    settings = result.settings
    best = settings.get("train.load_best_model_at_end")
    steps = settings.get("train.eval_steps") or settings.get("train.save_steps")
    if best is None or best.value is not True or steps is None:
        return
    reason = f"train.load_best_model_at_end needs a checkpoint at every evaluation: {steps.value} steps"
    for key in ("train.eval_steps", "train.save_steps"):
        before = settings.get(key)
        if before is None:
            settings[key] = Converted(steps.value, best.keys, "a checkpoint at every evaluation")
        elif before.value != steps.value:
            result.differs += [Item(name, before.value, f"{key}: {reason}") for name in before.keys]
            settings[key] = Converted(steps.value, before.keys, "a checkpoint at every evaluation")


def _mention_16bit_base(result: Conversion) -> None:
    """Name the base in 16 bits, where theirs is stored in 4 bits."""
    base = result.settings.get(BASE)
    if base is None or not STORED_IN_4BIT.search(str(base.value)):
        return
    whole = STORED_IN_4BIT.sub("", str(base.value))
    note = f"{BASE}: already rounded to 4 bits; a merge is closer to the original from the 16-bit base, {whole}"
    result.differs += [Item(key, base.value, note) for key in base.keys[:1]]


def _drop_refused(result: Conversion) -> None:
    """Move settings that the schema refuses to the lost ones, until it accepts the rest or something is missing."""
    while True:
        config = result.plain()
        try:
            RunConfig.model_validate(as_tuples(config), strict=True)
        except ValidationError as error:
            problems = problems_of(error, as_node(config))
        else:
            return
        refused = {
            setting: problem.text for problem in problems for setting in _to_drop(result, problem.name, problem.text)
        }
        if not refused:
            result.problems = [f"{problem.name}: {problem.text}" for problem in problems]
            return
        for path in [setting for setting in refused if setting.endswith("].path")]:
            beside = [setting for setting in result.settings if setting.startswith(path.removesuffix("path"))]
            refused = dict.fromkeys(beside, f"{path} {refused[path]}") | refused
        for setting, reason in refused.items():
            converted = result.settings.pop(setting)
            items = [Item(key, converted.value, f"{setting}: {reason}") for key in converted.keys]
            result.lost += items or [Item(f"{result.trainer.title}'s default", converted.value, f"{setting}: {reason}")]
            result.differs = [item for item in result.differs if item.key not in converted.keys]
        _expand_sources(result)  # a source without its path is gone


def _to_drop(result: Conversion, name: str, text: str) -> list[str]:
    """Return the settings to drop for a problem: what another one does not support, else the one it names."""
    _, found, rest = text.partition(" does not support ")
    if found:
        amounts = (".weight", ".num_rows") if "weight or num_rows" in rest else ()
        settings = SETTING.findall(rest)
        return [setting for setting in result.settings if setting in settings or setting.endswith(amounts)]
    return [
        setting for setting in result.settings if setting == name or name.startswith((f"{setting}[", f"{setting}."))
    ]
