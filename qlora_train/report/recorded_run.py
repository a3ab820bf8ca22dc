"""What a run folder recorded, read for a report: every file is optional, and one that cannot be read is named."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qlora_train.config import RunConfig, load_config
from qlora_train.data.held_out_rows import load_rows
from qlora_train.data.types import Prompt
from qlora_train.runs import RunFolder, read_json
from qlora_train.utils.errors import CheckpointError, ConfigError, UserError

JsonObject = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RecordedSetting:
    """A setting of config.yaml, with its default as JSON; a required setting has none."""

    key: str
    value: Any
    default: Any = None
    is_required: bool = False

    @property
    def differs(self) -> bool:
        """Whether the value is not the default."""
        return self.is_required or bool(self.value != self.default)


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The contents of a run folder.

    Attributes:
        folder: the run folder.
        metadata: run.json.
        data: data.json.
        results: results.json.
        commands: lines of command.txt.
        plan: plan.json.
        row_losses: row_losses.json.
        parity_checks: fused_kernels.json and padding_free.json by name.
        metrics: lines of metrics.jsonl.
        answers: lines of answers.jsonl.
        samples: lines of samples.jsonl.
        settings: of config.yaml, in the order of the schema.
        prompts: of held-out rows, by location.
        problems: files that cannot be read, one line each.
    """

    folder: RunFolder
    metadata: JsonObject
    data: JsonObject
    results: JsonObject
    commands: tuple[str, ...]
    plan: JsonObject
    row_losses: JsonObject
    parity_checks: dict[str, JsonObject]
    metrics: tuple[JsonObject, ...]
    answers: tuple[JsonObject, ...]
    samples: tuple[JsonObject, ...]
    settings: tuple[RecordedSetting, ...]
    prompts: Mapping[str, Prompt]
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.path.resolve().name

    @property
    def training(self) -> JsonObject:
        """The results of training; empty before it has finished."""
        return dict(self.results.get("training") or {})

    @property
    def is_on_cpu(self) -> bool:
        """Whether it trained on a CPU, where `peak_memory_bytes` is of the whole process, which no plan counts."""
        return self.metadata.get("num_threads") is not None

    @property
    def last_step(self) -> int:
        """The last step with metrics; 0 before the first."""
        return int(max((line["step"] for line in self.metrics), default=0))


def read_run(path: Path) -> RecordedRun:
    """Read a run folder.

    Raises:
        CheckpointError: `path` is not a run folder.
    """
    folder = RunFolder(path)
    if not folder.config_file.is_file():
        raise CheckpointError(f"{path}: is not a run folder (no config.yaml); give one such as runs/llama7b")
    problems: list[str] = []

    def content(file: Path) -> JsonObject:
        return _noting(problems, lambda: _object(file), {})

    def lines(file: Path, *keys: str) -> tuple[JsonObject, ...]:
        return _noting(problems, lambda: _read_lines(file, keys, problems), ())

    return RecordedRun(
        folder=folder,
        metadata=content(folder.metadata_file),
        data=content(folder.data_report_file),
        results=content(folder.results_file),
        commands=_noting(problems, lambda: tuple(folder.commands()), ()),
        plan=content(folder.path / "plan.json"),
        row_losses=content(folder.row_losses_file),
        parity_checks={
            "fused kernels": content(folder.fused_kernels_file),
            "padding-free": content(folder.padding_free_file),
        },
        metrics=lines(folder.metrics_file, "step"),
        answers=lines(folder.answers_file, "where", "expected"),
        samples=lines(folder.samples_file, "step", "row", "prompt", "expected", "generated"),
        settings=_noting(problems, lambda: _read_settings(folder.config_file), ()),
        prompts=_noting(problems, lambda: _read_prompts(folder.rows), {}),
        problems=tuple(problems),
    )


def _noting(problems: list[str], read: Callable[[], T], missing: T) -> T:
    """Return what `read` returns, or `missing` with a note of the error."""
    try:
        return read()
    except UserError as error:
        problems.extend(error.problems)
    except OSError as error:
        problems.append(f"{error.filename}: cannot be read ({error.strerror})")
    return missing


def _object(file: Path) -> JsonObject:
    content = read_json(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is not a JSON object")
    return content


def _read_lines(file: Path, keys: Sequence[str], problems: list[str]) -> tuple[JsonObject, ...]:
    """Read JSON lines that have all `keys`; a killed process leaves an incomplete last line."""
    if not file.is_file():
        return ()
    found, num_unreadable = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n"):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if (
            isinstance(content, dict)
            and all(key in content for key in keys)
            and isinstance(content.get("step", 0), int)
        ):
            found.append(content)
        else:
            num_unreadable += 1
    if num_unreadable:
        problems.append(f"{file}: {num_unreadable} of {num_unreadable + len(found)} lines cannot be read, left out")
    return tuple(found)


def _read_settings(file: Path) -> tuple[RecordedSetting, ...]:
    """Read the settings of a run; a config of another version of this package is an error."""
    try:
        config = load_config(file)
    except ConfigError as error:
        raise CheckpointError(f"{file}: settings are not shown: {error.problems[0]}") from None
    values = config.model_dump(mode="json")
    return tuple(
        RecordedSetting(f"{section}.{key}", value, defaults.get(key), key not in defaults)
        for section in RunConfig.model_fields
        for defaults in [_defaults(section)]
        for key, value in values[section].items()
    )


def _defaults(section: str) -> JsonObject:
    """Return the defaults of a section's settings as JSON; those of required settings are left out."""
    kind: Any = RunConfig.model_fields[section].annotation
    optional = {name: field for name, field in kind.model_fields.items() if not field.is_required()}
    defaults = kind.model_construct(
        **{name: field.get_default(call_default_factory=True) for name, field in optional.items()}
    )
    return dict(defaults.model_dump(mode="json", include=set(optional), warnings=False))


def _read_prompts(folder: Path) -> dict[str, Prompt]:
    if not folder.is_dir():
        return {}
    return {row.where: row.prompt for row in load_rows(folder).eval if row.prompt is not None}
