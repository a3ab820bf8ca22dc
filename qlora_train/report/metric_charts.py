"""The charts of a report: series over optimizer steps from metrics.jsonl, with a summary in words for each."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from qlora_train.report.html_text import shown
from qlora_train.report.number_text import axis_unit, number_text
from qlora_train.report.recorded_run import RecordedRun

Kind = Literal["line", "points", "raw"]
Values = Sequence[float | None]
T = TypeVar("T")

MAX_SMOOTHING = 0.95
"""Weight of earlier values in the running mean of the training loss of a long run."""
SMOOTHED_SHARE = 0.05
"""Share of a run over which the running mean averages."""
MIN_SMOOTHED_POINTS = 20
MAX_POINTS = 20_000
"""Points of a chart, over all its metrics; of a metric with more than its share, every n-th is shown."""
PEAK_MEMORY = "peak_memory_bytes"
OBJECTIVE = "train.objective"
NOT_CHARTED = {"step", "epoch", "eval_runtime_seconds"}


@dataclass(frozen=True, slots=True)
class ChartKind:
    """A chart and the metrics that it shows.

    Attributes:
        metrics: keys of metrics.jsonl, each with its name in the legend.
        unit: of the values; `bytes` and `share` are scaled for display.
    """

    key: str
    title: str
    unit: str
    metrics: Mapping[str, str]
    is_wide: bool = False


CHARTS = (
    ChartKind("loss", "Loss", "nats/token", {"loss": "training", "eval_loss": "held out"}, is_wide=True),
    ChartKind("learning_rate", "Learning rate", "", {"learning_rate": "learning rate"}),
    ChartKind("grad_norm", "Gradient norm", "before clipping", {"grad_norm": "gradient norm"}),
    ChartKind("throughput", "Throughput", "tokens/s", {"tokens_per_second": "tokens/s"}),
    ChartKind("memory", "Peak memory", "bytes", {PEAK_MEMORY: "measured"}),
)
"""The charts of every run; other metrics have a chart each, together with that of held-out rows."""
MFU = ChartKind("mfu", "Model FLOPs utilization", "share", {"mfu": "MFU"})
"""Of runs on devices whose peak is known."""


@dataclass(frozen=True, slots=True)
class Series:
    """Values at the steps of a chart, None where there is none; `run` is the index of a compared run."""

    name: str
    kind: Kind
    values: Values
    run: int | None


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart over optimizer steps; `summary` says in words what it shows, or why it is empty."""

    kind: ChartKind
    steps: Sequence[int]
    series: Sequence[Series]
    levels: Sequence[Level]
    summary: str

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.kind.key,
            "unit": self.kind.unit,
            "axis": axis_unit(self.kind.unit),
            "steps": list(self.steps),
            "series": [
                {
                    "name": shown(each.name),
                    "kind": each.kind,
                    "run": each.run,
                    "values": [_rounded(v) for v in each.values],
                }
                for each in self.series
            ],
            "levels": [{"name": shown(each.name), "value": each.value} for each in self.levels],
        }


def charts_of(run: RecordedRun) -> list[Chart]:
    """Return the charts of one run."""
    return [
        _chart(kind, [_Line(run, key, _legend(run, key, name)) for key, name in kind.metrics.items()])
        for kind in _kinds([run])
    ]


def _legend(run: RecordedRun, key: str, name: str) -> str:
    return "whole process" if key == PEAK_MEMORY and run.is_on_cpu else name


def compared_charts(runs: Sequence[RecordedRun], labels: Sequence[str]) -> list[Chart]:
    """Return a chart for each metric, with a line for each run; `labels` are the names of the runs."""
    charts = []
    for kind in _kinds(runs):
        for key, name in kind.metrics.items():
            title = kind.title if len(kind.metrics) == 1 else f"{kind.title}, {name}"
            single = replace(kind, key=key, title=title, metrics={key: name}, is_wide=False)
            lines = [_Line(run, key, label, index) for index, (run, label) in enumerate(zip(runs, labels, strict=True))]
            charts.append(_chart(single, lines))
    return charts


def _kinds(runs: Sequence[RecordedRun]) -> Iterator[ChartKind]:
    """Yield the charts of every run, and one for each metric of the objective."""
    trains_answers = all(setting.value == "sft" for run in runs for setting in run.settings if setting.key == OBJECTIVE)
    loss, *others = CHARTS
    yield from (loss if trains_answers else replace(loss, unit=""), *others)
    if any("mfu" in line for run in runs for line in run.metrics):
        yield MFU
    known = {metric for kind in (*CHARTS, MFU) for metric in kind.metrics}
    found = {key: None for run in runs for line in run.metrics for key in line if key not in known | NOT_CHARTED}
    for name in dict.fromkeys(key.removeprefix("eval_") for key in found):
        title = name.replace("_", " ").replace("/", ": ").capitalize()
        yield ChartKind(name, title, "", {name: "training", f"eval_{name}": "held out"})


@dataclass(frozen=True, slots=True)
class _Line:
    """A metric of a run and its name; `index` is that of a compared run, None in the chart of one run."""

    run: RecordedRun
    key: str
    name: str
    index: int | None = None

    @property
    def title(self) -> str:
        """The name as a sentence begins; that of a run stays as it is."""
        return self.name.capitalize() if self.index is None else self.name


def _chart(kind: ChartKind, lines: Sequence[_Line]) -> Chart:
    points = [values_of(line.run, line.key) for line in lines]
    share = MAX_POINTS // len(lines)
    steps = sorted({step for values in points for step in thinned(sorted(values), share)})
    drawn = [(line, values) for line, values in zip(lines, points, strict=True) if values]
    series = [each for line, values in drawn for each in _series(line, values, steps)]
    levels = [level for line, _ in drawn for level in _planned(line)]
    sentences = [_sentence(line.title, values, kind.unit) for line, values in drawn]
    sentences += [f"{level.name}: {number_text(level.value, kind.unit)}." for level in levels]
    return Chart(kind, steps, series, levels, " ".join(sentences) or _why_empty(kind))


def thinned(items: Sequence[T], max_items: int) -> list[T]:
    """Return every n-th item, at most `max_items`, and the last one."""
    kept = list(items[:: math.ceil(len(items) / max_items) or 1])
    return kept if kept[-1:] == [*items[-1:]] else [*kept, items[-1]]


def values_of(run: RecordedRun, key: str) -> dict[int, float]:
    """Return the finite values of a metric by step."""
    return {
        line["step"]: float(line[key])
        for line in run.metrics
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    }


def _series(line: _Line, points: Mapping[int, float], steps: Sequence[int]) -> Iterator[Series]:
    values, is_one_run = [points.get(step) for step in steps], line.index is None
    if line.key.startswith("eval_"):
        yield Series(line.name, "points", values, line.index)
    elif line.key == "loss" and len(points) >= MIN_SMOOTHED_POINTS:
        if is_one_run:
            yield Series(line.name, "raw", values, line.index)
        mean = f"{line.name}, running mean" if is_one_run else line.name
        yield Series(mean, "line", _running_mean(values), line.index)
    else:
        yield Series(line.name, "line", values, line.index)


def _running_mean(values: Values) -> list[float | None]:
    """Return the exponential running mean, corrected for its start as Adam's moments are."""
    num_averaged = max(3.0, SMOOTHED_SHARE * sum(value is not None for value in values))
    smoothing = min(MAX_SMOOTHING, 1 - 2 / (num_averaged + 1))
    means: list[float | None] = []
    total = weight = 0.0
    for value in values:
        if value is not None:
            total = smoothing * total + (1 - smoothing) * value
            weight = smoothing * weight + (1 - smoothing)
        means.append(None if value is None else total / weight)
    return means


def _planned(line: _Line) -> Iterator[Level]:
    """Yield the planned peak of the GPU, with the CUDA context, as the measured one."""
    planned = line.run.plan.get("peak_bytes")
    if line.key == PEAK_MEMORY and planned and not line.run.is_on_cpu:
        yield Level("Planned" if line.index is None else f"{line.name}, planned", float(planned))


def _sentence(name: str, points: Mapping[int, float], unit: str) -> str:
    """Say where a metric begins, ends and turns; the axis has the unit of most."""
    unit = unit if unit in ("bytes", "share") else ""
    first, last = min(points), max(points)
    lowest, highest = min(points, key=points.__getitem__), max(points, key=points.__getitem__)
    if first != last and points[lowest] == points[highest]:
        return f"{name}: {number_text(points[first], unit)} from step {first} to {last}."
    parts = [f"{number_text(points[step], unit)} at step {step}" for step in dict.fromkeys((first, last))]
    for word, step in (("lowest", lowest), ("highest", highest)):
        if step not in (first, last):
            parts.append(f"{word} {number_text(points[step], unit)} at step {step}")
    return f"{name}: {', '.join(parts)}."


def _why_empty(kind: ChartKind) -> str:
    return f"Not recorded: metrics.jsonl has no {' or '.join(kind.metrics)}."


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
