"""Render a report: one HTML page that loads nothing, neither from the network nor from other files.

Its Content-Security-Policy names the hashes of its own style and scripts, so that a browser runs no other, and allows no
connection.
"""

import base64
import datetime
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qlora_train import __version__
from qlora_train.report.graded_answers import OUTCOMES, count_outcomes, grade_answers, models_of
from qlora_train.report.html_text import json_block, shown
from qlora_train.report.metric_charts import Chart, charts_of, compared_charts, thinned
from qlora_train.report.number_text import number_text, setting_text
from qlora_train.report.recorded_run import RecordedRun
from qlora_train.report.run_comparison import compare_runs
from qlora_train.report.run_facts import checks_of, figures_of, method_of, status_of
from qlora_train.report.sample_answers import samples_by_prompt

STYLES = ("vendor/uplot/uPlot.min.css", "assets/report.css")
SCRIPTS = ("vendor/uplot/uPlot.iife.min.js", "assets/report.js")
POLICY = (
    "default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:; base-uri 'none'; form-action 'none'"
)
MAX_ANSWERS = 300
"""Held-out rows whose answers are shown, those that are wrong first."""
MAX_TABLE_STEPS = 200
"""Steps in the table of metrics, and as many evaluations; of more, every n-th is shown."""


def render_run(run: RecordedRun) -> str:
    """Return the page about one run."""
    charts, rows = charts_of(run), grade_answers(run.answers, run.prompts)
    return _render(
        "run.html", charts, run=run, title=run.name, status=status_of(run), method=method_of(run), figures=figures_of(run),
        checks=checks_of(run), rows=rows[:MAX_ANSWERS], num_rows=len(rows), outcomes=count_outcomes(rows),
        outcome_names=OUTCOMES, models=models_of(run.answers) if rows else [], samples=samples_by_prompt(run.samples),
        row_losses=_losses_by_location(run), metrics=_table_lines(run.metrics),
        evaluation=run.results.get("evaluation", {}), tasks=run.results.get("tasks", {}),
        exports=run.results.get("export", {}),
    )  # fmt: skip


def render_comparison(runs: Sequence[RecordedRun]) -> str:
    """Return the page that compares several runs."""
    comparison = compare_runs(runs)
    charts = compared_charts(runs, comparison.labels)
    return _render("compare.html", charts, runs=runs, title=" | ".join(comparison.labels), comparison=comparison)


def _render(template: str, charts: Sequence[Chart], **context: Any) -> str:
    styles, scripts = "\n".join(map(_asset, STYLES)), [_asset(name) for name in SCRIPTS]
    return _environment().get_template(template).render(
        policy=POLICY.format(scripts=" ".join(map(_hash, scripts)), styles=_hash(styles)),
        styles=Markup(styles),
        scripts=[Markup(script) for script in scripts],
        charts=charts,
        chart_data=json_block([chart.to_json() for chart in charts]),
        version=__version__,
        today=datetime.date.today().isoformat(),
        **context,
    )  # fmt: skip


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("qlora_train.report"), autoescape=True, finalize=shown, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number_text,
        "setting": setting_text,
        "share_of": lambda value, total: value / total,
    }
    return environment


@cache
def _asset(name: str) -> str:
    """Return a file of this package."""
    return files("qlora_train.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _losses_by_location(run: RecordedRun) -> dict[str, float]:
    """Return the losses of held-out rows."""
    part = run.row_losses.get("eval", {})
    return {row["where"]: row["loss"] for row in (*part.get("rows", ()), *part.get("other_rows", ()))}


def _table_lines(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line a step, with the metrics of training and evaluation."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in metrics:
        by_step.setdefault(line["step"], {}).update(line)
    evaluations = [step for step, line in by_step.items() if any(key.startswith("eval_") for key in line)]
    shown = {*thinned(list(by_step), MAX_TABLE_STEPS), *thinned(evaluations, MAX_TABLE_STEPS)}
    return [line for step, line in by_step.items() if step in shown]
