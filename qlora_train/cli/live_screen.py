"""The live view of a run: what the events have shown so far, and how it looks on a screen of 80 x 24 or more."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_train.utils.run_events import (
    Event,
    Measured,
    Outcome,
    Progress,
    Restored,
    RunOpened,
    Sampled,
    StageEnded,
    StageStarted,
    StepEnded,
    amount,
)
from qlora_train.utils.visible_text import visible

PREPARATION = ("data", "base", "adapter", "parity check", "memory")
"""Stages before the first step, in their order."""
REFERENCE = "reference"
"""The last stage before the first step of an objective with a reference model."""
BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 32
TREND_POINTS = 20
"""Log points that give the trend of the loss: the mean of their later half against that of the earlier."""
LEVEL_CHANGE = 0.005
"""A smaller relative change of the loss is level."""
BAR_WIDTH = 34
MARKS: Mapping[Outcome, tuple[str, str]] = {
    "done": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "stopped": ("■", "bold yellow"),
}
"""Mark and style of a stage that has ended."""


class LiveScreen:
    """Receives events, and draws a run as it stands."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._stages: dict[str, StageEnded | None] = {}
        self._progress: Progress | None = None
        self._step: StepEnded | None = None
        self._measured: Measured | None = None
        self._values: dict[str, float] = {}
        self._losses: list[float] = []
        self._evals: dict[int, float] = {}
        self._sample: Sampled | None = None
        self._planned_bytes: int | None = None

    def receive(self, event: Event) -> None:
        """Take in an event."""
        match event:
            case RunOpened():
                self._folder = event.folder
            case StageStarted():
                self._stages[event.name], self._progress = None, None
            case StageEnded():
                self._stages[event.name], self._progress = event, None
            case Progress():
                self._progress = None if event.is_complete else event
            case Restored():
                self._losses = [entry["loss"] for entry in event.history if "loss" in entry]
                self._evals = {int(each["step"]): each["eval_loss"] for each in event.history if "eval_loss" in each}
            case StepEnded():
                self._step = event
            case Measured():
                self._measure(event)
            case Sampled():
                self._sample = event

    def _measure(self, event: Measured) -> None:
        if self._measured is None and self._folder is not None:
            self._planned_bytes = planned_peak_bytes(self._folder)
        self._measured = event
        self._values.update(event.values)
        if "loss" in event.values:
            self._losses.append(event.values["loss"])
        if "eval_loss" in event.values:
            self._evals[event.step] = event.values["eval_loss"]

    # --- drawing -----------------------------------------------------------------------------------------------------

    def __rich__(self) -> Group:
        lines: list[Any] = [self._stage_line()]
        if self._progress is not None:
            lines.append(_progress_line(self._progress))
        if self._step is not None:
            lines += [self._step_line(), self._table()]
        if self._folder is not None:
            lines.append(_line(f"all log lines: {self._folder / 'run.log'}", "dim"))
        return Group(*lines)

    def _stage_line(self) -> Text:
        line = Text()
        before = (*PREPARATION, *([REFERENCE] if REFERENCE in self._stages else []), "training")
        later = [name for name in self._stages if name not in before]
        for name in (*before, *later):
            mark, style = self._mark(name)
            line.append(f"{mark} {name}".replace(" ", "\N{NO-BREAK SPACE}"), style).append("  ")
        return line

    def _mark(self, name: str) -> tuple[str, str]:
        if name not in self._stages:
            return "·", "dim"
        ended = self._stages[name]
        if ended is None:
            return "▸", "bold cyan"
        return MARKS[ended.outcome]

    def _step_line(self) -> Table:
        assert self._step is not None
        step, total = self._step.step, self._step.num_steps
        row = Table.grid(padding=(0, 1))
        epoch = self._measured.epoch if self._measured else None
        parts = [f"{100 * step / max(total, 1):.0f} %", *([f"epoch {epoch:.2f}"] if epoch is not None else [])]
        bar = ProgressBar(total=max(total, 1), completed=step, width=BAR_WIDTH)
        row.add_row(_line(f"step {step:,}/{total:,}", "bold"), bar, _line("  ".join(parts)))
        return row

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(style="dim", no_wrap=True, width=8)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for name, value in self._rows():
            table.add_row(name, value)
        return table

    def _rows(self) -> list[tuple[str, Text]]:
        rows: list[tuple[str, Text]] = []
        if self._losses:
            text = Text.assemble((f"{self._losses[-1]:.4f}  ", "bold"), (sparkline(self._losses), "cyan"))
            rows.append(("loss", text.append(f"  {trend(self._losses)}")))
        if self._evals:
            rows.append(("eval", _line(self._eval_text())))
        if self._measured is not None:
            if speed := self._speed_text(self._measured):
                rows.append(("speed", _line(speed)))
            rows.append(("rate", _line(self._rate_text())))
            if memory := self._memory_text(self._measured):
                rows.append(("memory", _line(memory)))
        if self._sample is not None:
            rows += _sample_rows(self._sample)
        return rows

    def _eval_text(self) -> str:
        last, best = max(self._evals), min(self._evals, key=lambda step: self._evals[step])
        text = f"{self._evals[last]:.4f} at step {last:,}"
        return f"{text}, the best so far" if last == best else f"{text}; best {self._evals[best]:.4f} at step {best:,}"

    def _rate_text(self) -> str:
        shown = {"learning_rate": "learning rate {:.2e}", "grad_norm": "gradient norm {:.3f}"}
        return "   ".join(text.format(self._values[key]) for key, text in shown.items() if key in self._values)

    def _speed_text(self, measured: Measured) -> str:
        """Return the speed of the last log point and the time left; empty before the first step of a resumed run."""
        values, parts = self._values, []
        if "tokens_per_second" in values:
            parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in values:
            parts.append(f"mfu {100 * values['mfu']:.1f} %")
        if measured.seconds_left:
            ends = time.strftime("%H:%M", time.localtime(time.time() + measured.seconds_left))
            parts.append(f"{duration(measured.seconds_left)} left (ends {ends})")
        return "   ".join(parts)

    def _memory_text(self, measured: Measured) -> str | None:
        if measured.memory_bytes is None:
            return None
        planned = "" if self._planned_bytes is None else f" of {self._planned_bytes / 1e9:.1f} GB planned"
        return f"{measured.memory_bytes / 1e9:.1f} GB at most{planned}"


def _line(text: str, style: str = "") -> Text:
    return Text(visible(text), style, no_wrap=True, overflow="ellipsis")


def _progress_line(progress: Progress) -> Table:
    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=progress.total, completed=progress.done, width=BAR_WIDTH, pulse=progress.total is None)
    row.add_row(_line(progress.name), bar, _line(amount(progress)))
    return row


def _sample_rows(sample: Sampled) -> list[tuple[str, Text]]:
    is_right = sample.generated.strip() == sample.expected.strip()
    return [
        ("prompt", _line(sample.prompt)),
        ("answer", _line(sample.generated, "green" if is_right else "yellow")),
        ("expected", _line(sample.expected)),
    ]


def sparkline(values: Sequence[float], width: int = SPARKLINE_WIDTH) -> str:
    """Draw values as bars, the lowest as the lowest bar; more values than `width` are averaged."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    bounds = [len(finite) * index // count for index in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1)) if span else 0] for mean in means)


def trend(losses: Sequence[float]) -> str:
    """Describe where the loss goes."""
    recent = losses[-TREND_POINTS:]
    half = len(recent) // 2
    if half < 2:
        return ""
    earlier, later = sum(recent[:half]) / half, sum(recent[-half:]) / half
    change = (later - earlier) / abs(earlier) if earlier else 0.0
    if not math.isfinite(change) or abs(change) < LEVEL_CHANGE:
        return "→ level"
    return f"{'↘ falling' if change < 0 else '↗ rising'} ({100 * change:+.1f} %)"


def duration(seconds: float) -> str:
    """Return h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def planned_peak_bytes(folder: Path) -> int | None:
    """Return the peak that `plan.json` of a run promises, or None."""
    try:
        peak = json.loads((folder / "plan.json").read_text(encoding="utf-8")).get("peak_bytes")
    except (OSError, ValueError, AttributeError):
        return None
    return peak if isinstance(peak, int) else None
