"""`qlora-train eval` on preference runs: win rates, margins and rewards are those of a loop over Transformers' logits."""

import json
from pathlib import Path

import numpy as np
import pytest

from qlora_train.data.held_out_rows import load_rows
from qlora_train.export.finished_run import open_finished_run
from qlora_train.inference.eval_report import EvalSettings, evaluate
from qlora_train.inference.run_models import run_models
from qlora_train.report.write_report import try_write_report
from qlora_train.runs import RunFolder
from tests.support.label_logps import log_probabilities
from tests.support.runs import metrics, train_run

BETA = 0.2
PAIR_SETTINGS = ("quantization.bnb_4bit_compute_dtype=float32", "data.max_length=128", "train.max_steps=6")


@pytest.fixture(scope="module")
def string_run(tmp_path_factory: pytest.TempPathFactory, pico_llama: Path) -> RunFolder:
    """A run on pairs of strings; both answers have several lengths."""
    folder = tmp_path_factory.mktemp("strings")
    rows = [
        {
            "prompt": f"count {number}: ",
            "chosen": "one two " * (1 + number % 3),
            "rejected": "fox dog " * (1 + number % 2),
        }
        for number in range(32)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train_run(
        folder, pico_llama, f"data.train={folder / 'pairs.jsonl'}", "train.objective=dpo", f"train.beta={BETA}",
        "export.merge=false", *PAIR_SETTINGS,
    )  # fmt: skip
    evaluate(run.path, EvalSettings(models=("base", "adapter"), generate=False))
    return run


def test_scores_of_pairs_are_those_of_their_log_probabilities(string_run: RunFolder) -> None:
    results = string_run.read_results()["evaluation"]
    pairs = load_rows(string_run.rows).eval
    assert len(pairs) > 3
    expected = {}
    for name, model, _ in run_models(open_finished_run(string_run.path), ("base", "adapter")):
        expected[name] = [[log_probabilities(model, each) for each in pair.sequences] for pair in pairs]
    sums = {name: np.array([[sum(each) for each in pair] for pair in of]) for name, of in expected.items()}
    means = {name: np.array([[np.mean(each) for each in pair] for pair in of]) for name, of in expected.items()}
    for name in ("base", "adapter"):
        assert results[name]["win_rate"] == np.mean(sums[name][:, 0] > sums[name][:, 1])
        assert results[name]["win_rate_per_token"] == np.mean(means[name][:, 0] > means[name][:, 1])
        assert results[name]["logp_margin"] == pytest.approx((sums[name][:, 0] - sums[name][:, 1]).mean(), rel=1e-4)
    ratios = BETA * (sums["adapter"] - sums["base"])
    assert results["adapter"]["reward_margin"] == pytest.approx((ratios[:, 0] - ratios[:, 1]).mean(), rel=1e-4)
    assert results["adapter"]["reward_accuracy"] == np.mean(ratios[:, 0] > ratios[:, 1])
    assert "reward_accuracy" not in results["base"]
    assert results["base"]["win_rate"] != results["base"]["win_rate_per_token"]


def test_rewards_are_those_of_the_runs_own_evaluation(string_run: RunFolder) -> None:
    results = string_run.read_results()["evaluation"]
    evaluated = [line for line in metrics(string_run) if "eval_loss" in line][-1]
    assert results["adapter"]["reward_accuracy"] == pytest.approx(evaluated["eval_rewards/accuracies"])
    assert results["adapter"]["reward_margin"] == pytest.approx(evaluated["eval_rewards/margins"], rel=1e-3)


def test_the_scores_are_printed_and_on_the_page(string_run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate(string_run.path, EvalSettings(models=("adapter",), generate=False))
    assert results["adapter"]["reward_margin"]  # kept from the evaluation with the base
    assert "win_rate" in results["base"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{100 * results['adapter']['win_rate']:.1f} %" in printed
    try_write_report(string_run.path)
    page = (string_run.path / "report.html").read_text()
    assert "prefers chosen" in page
    assert "reward accuracy" in page
