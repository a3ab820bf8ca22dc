"""Earlier runs on this device: how fast they were, and how far their plans were off. No torch.

They are the run folders beside a run's own, with plan.json and results.json.
"""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_train.planning.run_plan import RunPlan

MAX_RUNS = 200
"""Folders that are read, the latest first."""


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """A finished run.

    Attributes:
        operations: of the base's linear layers and the head, forward and backward; 0 if unknown.
        seconds: of its optimizer steps, over all its processes; None if unknown.
    """

    path: Path
    predicted_bytes: int
    measured_bytes: int
    operations: float
    seconds: float | None

    @property
    def ratio(self) -> float:
        """Measured peak relative to the planned one."""
        return self.measured_bytes / self.predicted_bytes


def earlier_runs(parent: Path, device: str, *, besides: Path | None = None) -> list[EarlierRun]:
    """Return the finished runs under a folder that ran on a device, the latest first."""
    if not parent.is_dir():
        return []
    results = [path for path in parent.glob("*/results.json") if besides is None or path.parent != besides]
    latest = sorted(results, key=lambda path: path.stat().st_mtime, reverse=True)[:MAX_RUNS]
    return [run for path in latest for run in _read(path.parent, device)]


def predict_seconds(plan: RunPlan, runs: Sequence[EarlierRun]) -> RunPlan:
    """Return a plan with the time of its optimizer steps, at the median speed of earlier runs."""
    operations = plan.operations
    rates = [run.operations / run.seconds for run in runs if run.seconds and run.operations]
    if operations is None or not rates:
        return plan
    rate, before = statistics.median(rates), plan.reference_operations
    return replace(plan, seconds=operations / rate, reference_seconds=before / rate if before else None)


def error_bar(runs: Sequence[EarlierRun]) -> str:
    """Return how far earlier plans were off, as text; empty without earlier runs."""
    if not runs:
        return ""
    ratios = [run.ratio for run in runs]
    plural = "s" if len(runs) > 1 else ""
    return (
        f"median {statistics.median(ratios):.2f}, at most {max(ratios):.2f} of the plan ({len(runs)} run{plural} here)"
    )


def _read(folder: Path, device: str) -> Iterator[EarlierRun]:
    """Yield the run of a folder, unless its files are incomplete or of another device."""
    plan, results = _content(folder / "plan.json"), _content(folder / "results.json")
    kept = results.get("plan")
    if plan.get("device") != device or not isinstance(kept, dict):
        return
    predicted, measured = kept.get("predicted_peak_bytes"), kept.get("measured_peak_bytes")
    if isinstance(predicted, int) and isinstance(measured, int) and predicted > 0 and measured > 0:
        operations, seconds = _positive(plan.get("operations")), _positive(kept.get("measured_seconds"))
        yield EarlierRun(folder, predicted, measured, operations or 0.0, seconds)


def _positive(value: object) -> float | None:
    """Return a number above 0, or None; JSON files may hold NaN and Infinity."""
    return float(value) if isinstance(value, int | float) and 0 < value < math.inf else None


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
