"""The page about a run: what it shows is what the run recorded, and nothing that it shows can act on the reader."""

import base64
import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pandas
import pytest

from qlora_train.cli.main import main
from qlora_train.config import RunConfig
from qlora_train.report.graded_answers import marked_differences
from qlora_train.report.html_text import MAX_CHARACTERS
from qlora_train.report.metric_charts import charts_of
from qlora_train.report.number_text import number_text
from qlora_train.report.recorded_run import read_run
from qlora_train.report.report_page import render_comparison, render_run
from qlora_train.report.write_report import try_write_report
from qlora_train.runs import RunFolder, write_json
from tests.support.report_runs import (
    Element,
    Page,
    begun_run,
    segment,
    write_answers,
    write_data_report,
    write_lines,
    write_metrics,
)
from tests.support.source_tree import PACKAGE

ANSWERS = [
    ('{"a": 1}', "no idea", '{"a":1}'),  # fixed: spacing does not count
    ("blue", "blue", "blue"),
    ("blue", "blue", "red"),
    ("one two three", "four", "one 2 three"),
]
HOSTILE = (
    '<script>window.hacked=1</script>"\'><img src=x onerror="window.hacked=1"></script><!--{{7*7}}{% raw %}\0\x1b[31m'
    "\u202emoc.live\u2066\ud800&lt;b&gt;"
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with metrics, answers and a data report."""
    folder = begun_run(tmp_path)
    write_metrics(folder)
    write_answers(folder, ANSWERS)
    write_data_report(folder, [segment("What?\n", trained=False), segment("This.", trained=True)])
    return folder


def page_of(run: RunFolder) -> Element:
    return Page.of(render_run(read_run(run.path))).root


def one(elements: list[Element]) -> Element:
    [element] = elements
    return element


# --- what it shows ----------------------------------------------------------------------------------------------------


def test_charts_hold_the_recorded_metrics(run: RunFolder) -> None:
    lines = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    charts = {chart["key"]: chart for chart in json.loads(one(page_of(run).find(id="chart-data")).text)}
    names = {"loss": "training", "grad_norm": "gradient norm", "throughput": "tokens/s", "memory": "measured"}
    keys = {"throughput": "tokens_per_second", "memory": "peak_memory_bytes"}
    assert charts.keys() == {*names, "learning_rate"}
    for chart, name in names.items():
        [series] = [each for each in charts[chart]["series"] if each["name"] == name]
        recorded = {line["step"]: line[keys.get(chart, chart)] for line in lines if keys.get(chart, chart) in line}
        drawn = dict(zip(charts[chart]["steps"], series["values"], strict=True))
        assert drawn == pytest.approx(recorded, rel=1e-5)
    [held_out] = [each for each in charts["loss"]["series"] if each["name"] == "held out"]
    assert [value for value in held_out["values"] if value is not None] == pytest.approx(
        [line["eval_loss"] for line in lines if "eval_loss" in line], rel=1e-5
    )


def test_running_mean_is_the_exponential_one_of_pandas(run: RunFolder) -> None:
    [chart] = [chart for chart in charts_of(read_run(run.path)) if chart.kind.key == "loss"]
    raw, mean, _ = chart.series
    assert mean.name == "training, running mean"
    expected = pandas.Series(raw.values, dtype=float).ewm(span=3, adjust=True).mean()
    assert mean.values == pytest.approx(expected.tolist())


def test_answers_are_marked_and_wrong_ones_come_first(run: RunFolder) -> None:
    answered = [each for each in page_of(run).find("article") if "data-kind" in each.attributes]
    assert [each.attributes["data-kind"] for each in answered] == ["wrong", "broken", "fixed", "right"]
    verdicts = [[mark.text.strip() for mark in each.find("span", class_="verdict")] for each in answered]
    assert verdicts == [["wrong", "wrong"], ["right", "wrong"], ["wrong", "right"], ["right", "right"]]
    assert [mark.text for mark in answered[0].find("mark", class_="differs")] == ["four", "2"]


@pytest.mark.parametrize(("expected", "text"), [("a b c", "a x c"), ("", "new"), ("gone", ""), ("same", "same")])
def test_marked_parts_join_to_the_answer(expected: str, text: str) -> None:
    parts = marked_differences(expected, text)
    assert "".join(part for part, _ in parts) == text
    equal = "".join(part for part, differs in parts if not differs)
    rest = iter(expected)
    assert all(character in rest for character in equal), "what is not marked is in the expected answer, in order"


def test_rows_show_the_loss_mask(run: RunFolder) -> None:
    data = one(page_of(run).find("section", id="data"))
    row = one(data.find("article"))
    assert [mark.text for mark in row.find("mark", class_="trained")] == ["[trained: This.]"]
    assert [part.text for part in row.find("span", class_="context")] == ["What?\n"]


def test_settings_that_differ_from_the_schema_are_marked(run: RunFolder) -> None:
    rows = [row for row in page_of(run).find("tr") if row.attributes.get("data-kind")]
    shown = {row.find("th")[0].text: row.attributes["data-kind"] for row in rows}
    num_settings = sum(len(field.annotation.model_fields) for field in RunConfig.model_fields.values())  # type: ignore[union-attr]
    assert len(shown) == num_settings
    assert {key for key, kind in shown.items() if kind == "set"} == {
        "model.model_name_or_path", "data.train", "data.eval", "data.max_length", "lora.r", "train.learning_rate",
        "train.gradient_accumulation_steps", "train.per_device_train_batch_size", "train.max_steps", "run.seed",
        "train.logging_steps", "train.eval_steps", "train.save_steps", "train.save_total_limit", "run.output_dir",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("num_threads", "legend", "level", "note"),
    [
        (None, "measured", 2_000_000_000, "planned 2.00 GB"),
        (2, "whole process", None, "whole process, not what the plan"),
    ],
)
def test_measured_memory_is_compared_with_the_plan_of_the_same_thing(
    run: RunFolder, num_threads: int | None, legend: str, level: int | None, note: str
) -> None:
    write_json(run.metadata_file, {"num_threads": num_threads})
    loose = {"caveats": ["experts"], "peak_bytes": 2_000_000_000, "parts": {"weights": 1.5e9, "runtime": 500_000_000}}
    write_json(run.plan_file, loose)
    assert "Known to be loose: experts." in one(page_of(run).find("section", id="checks")).text
    [memory] = [chart for chart in charts_of(read_run(run.path)) if chart.kind.key == "memory"]
    assert [series.name for series in memory.series] == [legend]
    assert [each.value for each in memory.levels] == ([] if level is None else [level])
    assert note in one(page_of(run).find("dl", class_="figures")).text


RESULTS = {
    "training": {
        "steps": 40, "taken_from_step": 40, "num_tokens": 33639, "num_skipped_steps": 2, "num_loss_spikes": 0,
        "train_seconds": 130.0, "step_seconds": 100.0, "since_last_start": {"reference_seconds": 12.0},
    },
    "plan": {
        "predicted_peak_bytes": 2_000_000_000, "measured_peak_bytes": 2_100_000_000, "predicted_seconds": 90.0,
        "measured_seconds": 100.0,
    },
    "quantization": {
        "quantized_share": 1.0, "num_linear_weights": 106168320, "bits_per_weight": 4.127,
        "bytes_by_dtype": {"uint8": 54_700_000, "bfloat16": 56_700_000}, "unquantized": ["odd.weight (bfloat16)"],
    },
    "adapter_check": {
        "passed": True, "kl_divergence": 0.00112, "max_divergence": 0.02, "top1_agreement": 0.967, "num_tokens": 330,
        "num_texts": 368,
    },
    "merge": {
        "merge_base": "dequantized", "rows": "held-out", "num_rows": 60, "num_tokens": 1977, "adapter_loss": 0.1468,
        "candidates": {
            "dequantized": {"loss": 0.1466, "kl_divergence": 0.0004, "top1_agreement": 0.997},
            "original": {"loss": 0.1481, "kl_divergence": 0.03, "top1_agreement": 0.978},
        },
    },
    "evaluation": {
        "num_rows": 60, "base": {"loss": 1.845, "perplexity": 6.329, "exact_match": 0.0},
        "adapter": {"loss": 0.1468, "perplexity": 1.158, "exact_match": 0.35}, "rows answered exactly": {"both": 21},
        "hosted": {"exact_match": 0.411},
    },
    "tasks": {"arc_easy": {"base": {"acc": 0.25}, "adapter": {"acc": 0.5}}},
    "export": {
        "gguf-q4_k_m": {
            "quant": "q4_k_m", "file": "run-q4_k_m.gguf", "size_bytes": 105_000_000, "loss": 0.1601,
            "loss_increase": 0.0135, "exact_match": 0.34, "reference": {"quant": "f16"},
        },
        "vllm": {"file": "unmeasured"},
        "lora-gguf-f16": {
            "file": "run-lora-f16.gguf", "base": "own-Q4_K_M.gguf", "base_loss": 2.549, "loss": 0.1173,
            "run_loss": None, "loss_increase": None, "exact_match": 0.391,
        },
    },
}  # fmt: skip
SHOWN = (
    "finished at step 40", "33,639 tokens", "2.10 GB", "planned 2.00 GB", "2 min 10 s",
    "optimizer steps 1 min 40 s (planned 1 min 30 s), 336.4 tokens/s",
    "2 steps skipped because of a non-finite number", "100.0 % of 106,168,320 linear weights in 4 bits, 4.127 bits each",
    "odd.weight (bfloat16) stays unquantized", "together", "111.40 MB", "KL divergence 0.00112 nats/token",
    "kept: held-out loss 0.1466, with the adapter 0.1468", "not kept: held-out loss 0.1481", "35.0 %", "6.329", "41.1 %",
    "arc_easy: base acc 0.25; adapter acc 0.5", "run-q4_k_m.gguf", "105.00 MB", "+0.0135", "above f16",
    "reference log-probabilities 12.0 s", "run-lora-f16.gguf", "own-Q4_K_M.gguf", "2.549", "0.1173", "39.1 %",
)  # fmt: skip


def test_every_result_is_shown(run: RunFolder) -> None:
    write_json(run.results_file, RESULTS)
    text = " ".join(page_of(run).text.split())
    assert [each for each in SHOWN if each not in text] == []
    assert "unmeasured" not in text


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    run = begun_run(tmp_path)
    write_json(run.metadata_file, {"num_eval_rows": 0})
    text = " ".join(page_of(run).text.split())
    for sentence in ("not begun", "No metrics yet", "No evaluation: data.eval is 0", "No data report yet", "not made"):
        assert sentence in text


def test_unreadable_files_are_named_and_the_rest_is_shown(run: RunFolder) -> None:
    with run.metrics_file.open("a", encoding="utf-8") as file:
        file.write('{"step": 42, "lo')  # a killed process
    run.results_file.write_text("[1", encoding="utf-8")
    run.config_file.write_text("model: [", encoding="utf-8")
    warnings = [note.text for note in page_of(run).find("p", class_="warning")]
    for file in (run.metrics_file, run.results_file, run.config_file):
        assert sum(str(file) in each for each in warnings) == 1
    assert len(page_of(run).find("article")) == 5


# --- safe and readable for all ----------------------------------------------------------------------------------------


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    run = begun_run(tmp_path, name="run <i>")
    config = run.config_file.read_text(encoding="utf-8")
    run.config_file.write_text(config.replace(str(tmp_path / "base"), "<script>base</script>"), encoding="utf-8")
    write_lines(run.metrics_file, [{"step": 1, "loss": 1.0, "</script><script>window.hacked=1//": 2.0}])
    write_answers(run, [(HOSTILE, HOSTILE, HOSTILE + "x")])
    write_data_report(run, [segment(HOSTILE, trained=True)], where=f"{HOSTILE}:1")
    write_lines(
        run.path / "samples.jsonl", [{"step": 1, "row": 0, "prompt": HOSTILE, "expected": "a", "generated": HOSTILE}]
    )
    write_json(run.metadata_file, {"base": HOSTILE, "versions": {HOSTILE: HOSTILE}})
    run.record_command(HOSTILE.encode("ascii", "replace").decode())
    html = render_run(read_run(run.path))
    page = Page.of(html).root
    assert [len(page.find(tag)) for tag in ("script", "img", "i", "b")] == [3, 0, 0, 0]
    assert not [name for each in page.find() for name in each.attributes if name.startswith("on")]
    assert not re.findall("[\0-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    assert "7*7" in html
    assert "\\x1b[31m" in html
    html.encode()


def test_loss_of_pairs_has_no_unit_and_their_metrics_have_charts(tmp_path: Path) -> None:
    run = begun_run(tmp_path, "train.objective=orpo")
    write_lines(run.metrics_file, [
        {"step": 1, "loss": 0.9, "nll_loss": 0.8, "rewards/margins": 0.1},
        {"step": 1, "eval_loss": 0.7, "eval_nll_loss": 0.6},
    ])  # fmt: skip
    charts = {chart.kind.key: chart for chart in charts_of(read_run(run.path))}
    assert charts["loss"].kind.unit == ""
    assert [series.name for series in charts["nll_loss"].series] == ["training", "held out"]
    assert [series.name for series in charts["rewards/margins"].series] == ["training"]
    [loss, *_] = charts_of(read_run(begun_run(tmp_path, name="sft").path))
    assert loss.kind.unit == "nats/token"


def test_long_run_keeps_every_evaluation_and_its_end(run: RunFolder) -> None:
    training: list[dict[str, Any]] = [{"step": step, "loss": 1 / step} for step in range(1, 60_001)]
    evaluations = [{"step": step, "eval_loss": 2 / step} for step in range(1000, 60_001, 1000)]
    write_lines(run.metrics_file, sorted([*training, *evaluations], key=lambda line: line["step"]))
    recorded = read_run(run.path)
    [loss, *_] = charts_of(recorded)
    [held_out] = [series for series in loss.series if series.name == "held out"]
    drawn = {step: value for step, value in zip(loss.steps, held_out.values, strict=True) if value is not None}
    assert drawn == {line["step"]: line["eval_loss"] for line in evaluations}
    assert loss.steps[-1] == 60_000
    html = render_run(recorded)
    assert len(html) < 2_000_000
    [table] = [each for each in Page.of(html).root.find("table") if "Metrics by optimizer step" in each.text]
    steps = [row.find("th")[0].text for row in table.find("tr")[1:]]
    assert {f"{line['step']:,}" for line in evaluations} <= set(steps)
    assert steps[-1] == "60,000"


def test_long_texts_are_cut_and_say_so(run: RunFolder) -> None:
    write_answers(run, [("x" * 100_000, "y", "z" * MAX_CHARACTERS)])
    html = render_run(read_run(run.path))
    assert f"[... {100_000 - MAX_CHARACTERS:,} characters ...]" in html
    assert "z" * MAX_CHARACTERS in html


def test_browser_may_run_nothing_but_the_pages_own_code(run: RunFolder) -> None:
    page = page_of(run)
    policy = one(page.find("meta", http_equiv="Content-Security-Policy")).attributes["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    code = [script for script in page.find("script") if script.attributes.get("type") != "application/json"]
    for rule, elements in (("script-src", code), ("style-src", page.find("style"))):
        digests = [base64.b64encode(hashlib.sha256(each.text.encode()).digest()).decode() for each in elements]
        assert rules[rule].split() == [f"'sha256-{digest}'" for digest in digests]
    assert not [each for each in page.find() if "style" in each.attributes], "the policy forbids style attributes"
    addresses = [each.attributes[name] for each in page.find() for name in ("src", "href") if name in each.attributes]
    assert all(address.startswith("#") or address == "data:," for address in addresses)


def test_every_part_has_a_name_for_screen_readers(run: RunFolder) -> None:
    page = page_of(run)
    ids = [each.attributes["id"] for each in page.find() if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    for name in ("aria-labelledby", "aria-describedby", "data-filters", "data-more"):
        assert {each.attributes[name] for each in page.find() if name in each.attributes} <= set(ids)
    assert all(link.attributes["href"].removeprefix("#") in ids for link in page.find("a"))
    plots = page.find("div", class_="plot")
    assert len(plots) == 5
    assert all(plot.attributes.keys() >= {"tabindex", "role", "aria-label", "aria-describedby"} for plot in plots)
    assert all(table.find("caption") for table in page.find("table"))
    assert all("scope" in cell.attributes for cell in page.find("th"))
    levels = [int(each.tag[1]) for each in page.find() if re.fullmatch("h[1-6]", each.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(icon.attributes.get("aria-hidden") or icon.attributes.get("aria-label") for icon in page.find("svg"))


# --- several runs -----------------------------------------------------------------------------------------------------


def test_comparison_has_a_line_per_run_and_the_settings_that_differ(run: RunFolder, tmp_path: Path) -> None:
    other = begun_run(tmp_path, "lora.r=32", name="other")
    write_metrics(other, offset=0.5)
    write_answers(other, [*ANSWERS[:2], ("blue", "blue", "blue"), ANSWERS[3]])
    moved = other.answers_file.read_text(encoding="utf-8").replace("held.jsonl", "elsewhere/held.jsonl")
    other.answers_file.write_text(moved, encoding="utf-8")
    page = Page.of(render_comparison([read_run(run.path), read_run(other.path)])).root
    charts = {chart["key"]: chart for chart in json.loads(one(page.find(id="chart-data")).text)}
    assert [each["name"] for each in charts["eval_loss"]["series"]] == ["run", "other"]
    settings = one(page.find("section", id="settings-section"))
    assert [[cell.text for cell in row.find()] for row in settings.find("tbody")[0].find("tr")] == [
        ["lora.r", "8", "32"]
    ]
    assert [row.attributes["data-kind"] for row in page.find("article")] == ["disagree", "agree", "agree", "agree"]
    results = {row.find("th")[0].text: row for row in one(page.find("section", id="results")).find("tr")[1:]}
    assert [cell.text for cell in results["Held-out loss"].find("td")] == ["0.2best", "0.7"]


@pytest.mark.parametrize(
    ("metadata", "override", "note", "best"),
    [
        ({"data_fingerprint": "b", "base": "x"}, "lora.r=8", "different held-out rows", set()),
        ({"data_fingerprint": "a", "base": "y"}, "lora.r=8", "different bases or objectives", {"Exact match, adapter"}),
        (
            {"data_fingerprint": "a", "base": "x"},
            "train.objective=dpo",
            "different bases or obj",
            {"Exact match, adapter"},
        ),
        ({"data_fingerprint": "a", "base": "x"}, "lora.r=16", "", {"Exact match, adapter", "Held-out loss"}),
    ],
)
def test_only_what_can_be_compared_is_called_best(
    tmp_path: Path, metadata: dict[str, str], override: str, note: str, best: set[str]
) -> None:
    runs = [begun_run(tmp_path, name="first"), begun_run(tmp_path, override, name="second")]
    for index, (run, recorded) in enumerate(zip(runs, ({"data_fingerprint": "a", "base": "x"}, metadata), strict=True)):
        write_metrics(run, offset=index / 2)
        write_json(run.metadata_file, recorded)
        write_json(run.results_file, {
            "evaluation": {"adapter": {"exact_match": 0.5 + index / 4}},
            "plan": {"measured_peak_bytes": 10**9 * (1 + index)},
            "training": {"train_seconds": 60 * (1 + index)},
        })  # fmt: skip
    page = Page.of(render_comparison([read_run(run.path) for run in runs])).root
    assert [note in each.text for each in page.find("p", class_="warning")] == ([True] if note else [])
    rows = one(page.find("section", id="results")).find("tr")
    assert {row.find("th")[0].text for row in rows if row.find("span", class_="best")} == best
    assert {"Peak memory", "Training time"} <= {row.find("th")[0].text for row in rows}


@pytest.mark.parametrize("scores", [{}, {"field_f1": 0.5, "valid_json": 0.75}])
def test_scores_of_json_have_columns_only_where_rows_are_json(scores: dict[str, float], tmp_path: Path) -> None:
    run = begun_run(tmp_path)
    write_json(
        run.results_file, {"evaluation": {"num_rows": 4, "adapter": {"loss": 1.0, "exact_match": 0.5, **scores}}}
    )
    headings = {cell.text for cell in Page.of(render_run(read_run(run.path))).root.find("th")}
    assert "exact match" in headings
    assert {"field F1", "valid JSON"} & headings == ({"field F1", "valid JSON"} if scores else set())


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [begun_run(tmp_path / name) for name in ("first", "second")]
    html = render_comparison([read_run(run.path) for run in runs])
    assert html.count(f"<strong>{runs[0].path}</strong>") == 1
    assert html.count(f"<strong>{runs[1].path}</strong>") == 1


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_writes_one_page_or_a_comparison(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out == f"report: {run.path / 'report.html'}\n"
    other = begun_run(tmp_path, name="other")
    page = tmp_path / "both.html"
    assert main(["report", str(run.path), str(other.path), "--output", str(page)]) == 0
    assert "2 runs" in page.read_text(encoding="utf-8")


def test_command_says_what_is_wrong(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "is not a run folder": [str(tmp_path / "none")],
        "named twice": [str(run.path), f"{run.path}/"],
        "does not exist": [str(run.path), "-o", str(tmp_path / "none" / "page.html")],
    }
    for problem, arguments in wrong.items():
        assert main(["report", *arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert problem in line


DAMAGED = {
    "plan.json": [
        '{"peak_bytes": NaN, "parts": {"a": NaN}}',
        '{"peak_bytes": "1"}',
        '{"parts": {"a": 0}}',
        "[" * 100_000,
    ],
    "data.json": ['{"max_length": 3}', '{"sources": 1, "is_streamed": 2}'],
    "results.json": ['{"training": []}', '{"evaluation": 3, "merge": 4}', '{"quantization": null, "plan": null}'],
    "metrics.jsonl": [
        '{"step": "x", "loss": 1}',
        '{"step": null}',
        '{"step": 1, "loss": 1' + "0" * 400 + "}",
        "[" * 100_000,
    ],
    "answers.jsonl": ['{"where": ["a"], "expected": "x", "adapter": "y"}', '{"where": 3, "expected": null}'],
    "samples.jsonl": ['{"step": 1, "row": [1], "prompt": null, "expected": 2, "generated": {}}'],
    "run.json": ['{"versions": [1]}', '{"changes": 3, "base": {"<b>": 1}}', '{"versions": null}'],
    "row_losses.json": ['{"train": 3}', '{"eval": {"rows": [{}]}}'],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_damaged_files_are_one_line_at_most(
    run: RunFolder, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / name).write_text(text + "\n", encoding="utf-8")
    other = begun_run(run.path.parent, name="other")
    for command in (
        ["report", str(run.path)],
        ["report", str(run.path), str(other.path), "-o", f"{run.path}/both.html"],
    ):
        status = main(command)
        lines = capsys.readouterr().err.splitlines()
        assert (status, len(lines)) in ((0, 0), (2, 1))
        assert all(line.startswith(str(run.path)) and line.endswith("or delete it") for line in lines)


def test_a_report_that_fails_is_one_warning(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    run.path.joinpath("report.html").mkdir()
    try_write_report(run.path)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("report: not written (")


def test_wheel_holds_every_file_of_the_page() -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["qlora_train.report"]
    folder = PACKAGE / "report"
    packed = {file for pattern in patterns for file in folder.glob(pattern)}
    assert packed == {file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert {file.name for file in packed} >= {"LICENSE", "uPlot.iife.min.js", "report.css", "run.html"}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "", "-"), (0.0, "", "0"), (1234567, "", "1,234,567"), (0.00012, "", "1.20e-04"), (1.23456, "", "1.235"),
        (999, "bytes", "999 B"), (2_345_000_000, "bytes", "2.35 GB"), (0.5, "share", "50.0 %"),
        (59.94, "seconds", "59.9 s"), (3599.6, "seconds", "1 h 00 min"), (61, "seconds", "1 min 01 s"),
        (float("nan"), "", "nan"),
    ],
)  # fmt: skip
def test_numbers_have_units(value: float | None, unit: str, text: str) -> None:
    assert number_text(value, unit) == text
