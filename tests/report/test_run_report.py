"""The report that a real run writes: after training, after the checks, and after `eval`."""

import json
from pathlib import Path

import pytest

from qlora_train.cli.main import main
from qlora_train.runs import RunFolder
from tests.support.report_runs import Element, Page
from tests.support.runs import check_in_this_process, make_config, metrics, train_run

pytestmark = pytest.mark.usefixtures("preserve_library_settings")


@pytest.fixture(scope="module")
def run(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was trained, checked, and evaluated by commands."""
    folder = tmp_path_factory.mktemp("reported")
    make_config(folder, pico_llama)
    with pytest.MonkeyPatch.context() as patch:
        check_in_this_process(patch)
        settings = (
            f"model.model_name_or_path={pico_llama}", f"data.train={folder / 'rows.jsonl'}", "data.eval=0.25",
            "data.max_length=128",
            "train.max_steps=4", "train.eval_steps=2", "train.logging_steps=1", "train.gradient_accumulation_steps=2",
            f"run.output_dir={folder / 'trained'}",
        )  # fmt: skip
        assert main([str(folder / "run.yaml"), *settings]) == 0
        assert main(["eval", str(folder / "trained"), "--models", "base,adapter", "--max-new-tokens", "4"]) == 0
    return RunFolder(folder / "trained")


@pytest.fixture(scope="module")
def page(run: RunFolder) -> Element:
    return Page.of(run.report_file.read_text(encoding="utf-8")).root


def test_speed_and_memory_are_in_every_training_line(run: RunFolder, page: Element) -> None:
    lines = [line for line in metrics(run) if "loss" in line]
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 100_000_000 for line in lines)
    charts = {chart["key"]: chart for chart in json.loads(page.find(id="chart-data")[0].text)}
    assert charts["mfu"]["unit"] == "share"
    for key, metric in (("throughput", "tokens_per_second"), ("mfu", "mfu"), ("memory", "peak_memory_bytes")):
        assert charts[key]["series"][0]["values"] == pytest.approx([line[metric] for line in lines], rel=1e-5)


def test_report_has_the_command_and_the_answers(run: RunFolder, page: Element) -> None:
    command = page.find("div", class_="command")[0].find("code")[0].text
    assert command.startswith("qlora-train ")
    assert command.endswith(f"run.output_dir={run.path}")
    rows = [article for article in page.find("article") if "data-kind" in article.attributes]
    answers = [json.loads(line) for line in run.answers_file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(answers) > 0
    assert {row.find("code")[0].text for row in rows} == {line["where"] for line in answers}
    assert all(row.find("p", class_="prompt")[0].text for row in rows), "prompts are those of the run folder"


def test_quantization_summary_is_that_of_the_model(run: RunFolder, page: Element) -> None:
    summary = run.read_results()["quantization"]
    assert summary["quantized_share"] == summary["num_quantized_weights"] / summary["num_linear_weights"] == 1.0
    assert f"100.0 % of {summary['num_linear_weights']:,} linear weights" in page.text
    legend = page.find("section", id="checks")[0].find("dl", class_="legend-list")[0]
    assert [row.find("dt")[0].text for row in legend.children] == [*summary["bytes_by_dtype"], "together"]


def test_resumed_run_keeps_speeds_and_adds_its_command(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_in_this_process(monkeypatch)
    first = train_run(tmp_path, pico_llama, "train.max_steps=2", "train.save_steps=1")
    before = metrics(first)
    first.record_command("qlora-train a.yaml")
    first.record_command("qlora-train a.yaml")
    first.record_command("qlora-train b.yaml")
    assert first.commands() == ["qlora-train a.yaml", "qlora-train b.yaml"]
    (first.adapter / "manifest.json").unlink()  # as if it was killed before the adapter was written
    resumed = train_run(tmp_path, pico_llama, "train.max_steps=2", "train.save_steps=1")
    assert metrics(resumed) == before
