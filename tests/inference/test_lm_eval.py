"""Tasks of lm-evaluation-harness on a run, against accuracies computed from the models' own logits."""

import importlib.util
import json
import math
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.cli.main import main
from qlora_train.export.finished_run import FinishedRun, open_finished_run
from qlora_train.inference.lm_eval import TaskSettings, _measure, check_harness, measure_tasks
from qlora_train.inference.run_models import run_models
from qlora_train.utils.errors import ConfigError, DataError, ModelError
from tests.support.runs import train_run, write_rows

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="needs lm-eval, 350 MB: pip install 'qlora-train[lm-eval]'")
MODELS = ("base", "adapter", "merged")
NUM_ROWS = 16
NUM_NEW = 5
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("tasks")
    overrides = ("train.max_steps=3", "export.merge=true", "export.max_loss_increase=1")
    return open_finished_run(train_run(folder, pico("llama"), *overrides).path)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def likelihood(model: Any, tokenizer: Any, question: str, answer: str, *, between: str = " ") -> float:
    """The definition: sum of the log-probabilities of the answer's tokens after the question."""
    before = tokenizer(question, add_special_tokens=False)["input_ids"]
    ids = tokenizer(f"{question}{between}{answer}", add_special_tokens=False)["input_ids"]
    scores = logits(model, ids).log_softmax(-1)
    return sum(float(scores[at - 1, ids[at]]) for at in range(len(before), len(ids)))


def continuation(model: Any, tokenizer: Any, question: str) -> str:
    """Greedy decoding by hand, up to a newline."""
    ids = tokenizer(question, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < NUM_NEW and tokenizer.eos_token_id not in new:
        new.append(int(logits(model, ids + new)[-1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test", "doc_to_text": "{{q}}", "metadata": {"version": 3.0}, **settings,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task))


@needs_harness
def test_choices_and_generated_answers_are_scored_as_computed_by_hand(
    run: FinishedRun, tmp_path: Path, capsys: Capture
) -> None:
    questions = [f"{number} + {number * 7 % 5} =" for number in range(11, 11 + NUM_ROWS)]
    choices = [["Paris", "fox", str(number)] for number in range(NUM_ROWS)]
    chosen: dict[str, list[int]] = {}
    written: dict[str, list[str]] = {}
    for name, model, tokenizer in run_models(run, MODELS):
        chosen[name] = [
            max(range(3), key=lambda at: likelihood(model, tokenizer, question, of[at]))
            for question, of in zip(questions, choices, strict=True)
        ]
        written[name] = [continuation(model, tokenizer, question) for question in questions]
    labels = [chosen["adapter"][at] if at % 4 else (chosen["adapter"][at] + 1) % 3 for at in range(NUM_ROWS)]
    targets = [written["adapter"][at] if at % 2 else "something else" for at in range(NUM_ROWS)]
    write_task(
        tmp_path / "mine", "choices",
        [{"q": q, "of": of, "label": label} for q, of, label in zip(questions, choices, labels, strict=True)],
        output_type="multiple_choice", doc_to_choice="{{of}}", doc_to_target="label",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    write_task(
        tmp_path / "mine", "answers",
        [{"q": q, "a": target} for q, target in zip(questions, targets, strict=True)],
        output_type="generate_until", doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": NUM_NEW, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    arguments = ["--tasks", "choices,answers", "--task-path", str(tmp_path / "mine"), "--batch-size", "1"]
    assert main(["eval", str(run.folder.path), *arguments]) == 0
    found = run.folder.read_results()["tasks"]
    for name in MODELS:
        right = [a == b for a, b in zip(chosen[name], labels, strict=True)]
        assert found["choices"][name]["metrics"]["acc"]["value"] == sum(right) / NUM_ROWS
        exact = [a == b for a, b in zip(written[name], targets, strict=True)]
        assert found["answers"][name]["metrics"]["exact_match"]["value"] == sum(exact) / NUM_ROWS
        assert (found["answers"][name]["num_rows"], found["answers"][name]["task_version"]) == (NUM_ROWS, 3.0)
    assert found["choices"]["adapter"]["metrics"]["acc"]["value"] == 0.75
    assert found["answers"]["adapter"]["metrics"]["exact_match"]["value"] == 0.5
    assert found["choices"]["base"] != found["choices"]["adapter"]
    assert found["answers"]["base"] != found["answers"]["adapter"]
    table = capsys.readouterr().out
    assert re.search(r"answers\W+exact_match\W+0\.\d{4} ± 0\.\d{4}\W+0\.5000 ± 0\.1291\W+0\.\d{4}", table)


class Harness(types.ModuleType):
    """Replacement of lm-eval's modules that runs out of memory above `fits` rows."""

    def __init__(self, fits: int) -> None:
        super().__init__("lm_eval")
        self.fits, self.tried = fits, []  # type: ignore[var-annotated]

    def HFLM(self, *, batch_size: int, **_settings: Any) -> int:  # noqa: N802 - as it is called there
        return batch_size

    def simple_evaluate(self, batch_size: int, **_settings: Any) -> dict[str, Any]:
        self.tried.append(batch_size)
        if batch_size > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return {"results": {}}


@pytest.mark.parametrize(("fits", "tried"), [(8, [32, 16, 8]), (0, [32, 16, 8, 4, 2, 1])])
def test_tasks_that_do_not_fit_are_measured_with_half_the_batch(
    fits: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(fits)
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, harness)
    settings = TaskSettings(("mine",), batch_size=32)
    if fits:
        assert _measure(torch.nn.Linear(1, 1), None, None, settings, "") == {}
    else:
        with pytest.raises(
            ModelError, match=r"at --batch-size 1 \(CUDA out of memory.*drop the tasks with the longest"
        ):
            _measure(torch.nn.Linear(1, 1), None, None, settings, "")
    assert harness.tried == tried


@needs_harness
def test_tasks_are_added_to_earlier_results_and_limited(run: FinishedRun, tmp_path: Path) -> None:
    rows = [{"q": "a", "of": ["b", "c"], "label": 0}] * 5
    for name in ("first", "second"):
        write_task(
            tmp_path, name, rows, output_type="multiple_choice", doc_to_choice="{{of}}", doc_to_target="label",
            metric_list=[{"metric": "acc"}],
        )  # fmt: skip
    run.folder.add_results(training={"kept": True})
    settings = TaskSettings(("first",), models=("adapter",), limit=2, path=tmp_path)
    measure_tasks(run, settings)
    measure_tasks(run, replace(settings, models=("merged",), chat_template=True))
    measure_tasks(run, replace(settings, names=("second",)))
    results = run.folder.read_results()
    assert results["training"] == {"kept": True}
    assert results["tasks"]["first"].keys() == {"adapter", "merged"}
    assert results["tasks"]["first"]["adapter"]["num_rows"] == 2
    assert results["tasks"]["first"]["merged"]["chat_template"] is True
    assert results["tasks"]["second"].keys() == {"adapter"}


@needs_harness
def test_turns_have_the_system_prompt_of_the_training_rows(
    pico: Callable[..., Path], tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    system = {"role": "system", "content": "Add up the numbers. Answer as JSON."}
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run" / "rows.jsonl", system=system["content"])
    run = open_finished_run(train_run(tmp_path / "run", pico("llama"), "train.max_steps=2").path)
    [(_, model, tokenizer)] = run_models(run, ["adapter"])
    rows = [{"q": f"{number} + 5", "a": "seven"} for number in range(3)]

    def perplexity(*before: dict[str, str]) -> float:
        asked = [
            tokenizer.apply_chat_template(
                [*before, {"role": "user", "content": row["q"]}], tokenize=False, add_generation_prompt=True
            )
            for row in rows
        ]
        # the harness counts the white space before an answer as the answer's
        found = [likelihood(model, tokenizer, text.removesuffix("\n"), "seven", between="\n") for text in asked]
        return math.exp(-sum(found) / len(rows))

    assert perplexity(system) != pytest.approx(perplexity(), rel=0.02)
    write_task(
        tmp_path / "mine", "asked", rows, output_type="loglikelihood", doc_to_target="{{a}}",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    )  # fmt: skip
    settings = TaskSettings(("asked",), models=("adapter",), path=tmp_path / "mine")
    found = measure_tasks(run, replace(settings, chat_template=True))["asked"]["adapter"]
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(perplexity(system), rel=1e-3)
    assert found["system_prompt"] == system["content"]
    assert "chat template, system prompt of the training rows" in messages.text
    assert measure_tasks(run, settings)["asked"]["adapter"]["system_prompt"] == ""


@needs_harness
def test_head_that_training_has_untied_stays_untied(pico: Callable[..., Path], tmp_path: Path) -> None:
    overrides = ("train.max_steps=2", "lora.modules_to_save=[lm_head]")
    run = open_finished_run(train_run(tmp_path / "run", pico("gemma"), *overrides).path)
    question, answers = "1 + 2 =", ["Paris", "fox", "the quick brown fox", "3"]
    [(_, model, tokenizer)] = run_models(run, ["adapter"])
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    best = max(range(4), key=lambda at: likelihood(model, tokenizer, question, answers[at]))
    write_task(
        tmp_path / "mine", "one", [{"q": question, "of": answers, "label": best}] * 2,
        output_type="multiple_choice", doc_to_choice="{{of}}", doc_to_target="label", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    results = measure_tasks(run, TaskSettings(("one",), models=("adapter",), path=tmp_path / "mine"))
    assert results["one"]["adapter"]["metrics"]["acc"]["value"] == 1.0


@needs_harness
def test_unknown_or_broken_task_is_one_line(run: FinishedRun, tmp_path: Path) -> None:
    write_task(tmp_path, "capital", [{"q": "a", "of": ["b"], "label": 0}], output_type="multiple_choice")
    (tmp_path / "capital.jsonl").unlink()
    settings = TaskSettings(("capital",), path=tmp_path)
    with pytest.raises(DataError, match=r"^--tasks: capital: \w+: .*check the task's files") as caught:
        measure_tasks(run, settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^--tasks: 'capitol' is no task; .*; did you mean capital\?$"):
        measure_tasks(run, replace(settings, names=("capitol",)))
    with pytest.raises(ConfigError, match=r"--task-path: .* is no folder with task files"):
        measure_tasks(run, replace(settings, path=tmp_path / "nowhere"))


@pytest.mark.skipif(HAS_HARNESS, reason="the package is installed")
def test_missing_package_is_one_line_with_the_command() -> None:
    with pytest.raises(ConfigError, match=re.escape("run: pip install 'qlora-train[lm-eval]'")):
        check_harness()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "3"], "--limit: needs --tasks"),
        (["--task-path", "x", "--chat-template"], "--task-path: needs --tasks\n--chat-template: needs --tasks"),
        (["--tasks", "a", "--shots", "0"], "--shots: is for the held-out rows; drop it or --tasks"),
        (["--tasks", "a", "--loss-only"], "--loss-only: is for the held-out rows; drop it or --tasks"),
    ],
)
def test_options_of_the_other_kind_are_refused(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(["eval", "runs/x", *arguments]) == 2
    assert capsys.readouterr().err == message + "\n"


def test_list_of_tasks_with_a_gap_is_refused(capsys: Capture) -> None:
    assert main(["eval", "runs/x", "--tasks", "a,,b"]) == 2
    assert "'a,,b' is not a list of names" in capsys.readouterr().err
