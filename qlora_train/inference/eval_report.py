"""Evaluate a finished run: few-shot base, adapter and merged model on the same held-out rows."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_train.config import RunConfig
from qlora_train.config.objectives import OBJECTIVES, uses_reference
from qlora_train.data.held_out_rows import RunRows, load_rows
from qlora_train.data.types import Example, Prompt
from qlora_train.evaluation.generation import generate_answers
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.evaluation.pair_scores import PairLogps, measure_pairs
from qlora_train.evaluation.scoring import compare_answers, few_shot_prompt, score_answers
from qlora_train.export.finished_run import FinishedRun, open_finished_run
from qlora_train.inference.other_answers import read_answers
from qlora_train.inference.run_models import run_models
from qlora_train.runs import RunFolder, run_lock
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import DataError

logger = logging.getLogger(__name__)

MODELS = ("base", "adapter", "merged")
COMPARISON = "rows answered exactly"
"""Key of the row-by-row comparison of adapter and merged model."""
COLUMNS = {
    "loss": "loss", "perplexity": "perplexity", "exact_match": "exact match", "field_f1": "field F1",
    "valid_json": "valid JSON", "win_rate": "prefers chosen", "win_rate_per_token": "per token",
    "logp_margin": "log-prob margin", "reward_accuracy": "reward accuracy", "reward_margin": "reward margin",
}  # fmt: skip
SHARES = ("exact_match", "valid_json", "win_rate", "win_rate_per_token", "reward_accuracy")


@dataclass(frozen=True)
class EvalSettings:
    """Models to evaluate, generation settings, and the number of solved examples for the base model.

    Attributes:
        others: files with the answers of models elsewhere, by name (`other_answers`).
    """

    models: tuple[str, ...] = MODELS
    num_shots: int = 3
    max_new_tokens: int = 256
    batch_size: int = 32
    generate: bool = True
    others: Mapping[str, Path] = field(default_factory=dict)


def evaluate(path: Path, settings: EvalSettings) -> dict[str, Any]:
    """Evaluate the finished run at `path` (`evaluate_run`)."""
    run = open_finished_run(path)
    with run_lock(run.folder):
        return evaluate_run(run, settings)


def evaluate_run(run: FinishedRun, settings: EvalSettings) -> dict[str, Any]:
    """Evaluate the models of a run; print a table, and write results.json and answers.jsonl.

    Earlier results of the other models on the same adapter are kept, also in the table.

    Returns:
        By model name: `loss`, `perplexity`, and for rows with an answer `exact_match`, `valid_json`, `field_f1`; of
        preference pairs also `PairLogps.scores`, and `PairLogps.rewards` of the trained models.

    Raises:
        DataError: the run has no held-out rows.
        CheckpointError: only the merged model is requested, and does not exist.
    """
    data = load_rows(run.folder.rows)
    if not data.eval:
        raise DataError(f"{run.folder.path}: data.eval is not set, there is nothing to evaluate on; set it and train")
    held_out = [example for example in data.eval if example.desirable is not False]  # what the model is to write
    if not held_out:
        raise DataError(f"{run.folder.path}: no held-out answer is desirable; give some to data.eval and train")
    rows = [example for example in held_out if example.answer is not None]
    prompts = [example.prompt for example in rows if example.prompt is not None]
    batch_size = run.config.train.per_device_eval_batch_size
    results: dict[str, Any] = {}
    logps: dict[str, PairLogps] = {}
    answers = {name: read_answers(file, rows) for name, file in settings.others.items()}
    for name, model, tokenizer in run_models(run, settings.models):
        logger.info("evaluating: %s", name)
        loss = held_out_loss(model, held_out, batch_size=batch_size, pad_token_id=tokenizer.pad_token_id)
        results[name] = {"loss": loss.loss, "perplexity": loss.perplexity, "num_tokens": loss.num_tokens}
        if data.eval.has_pairs:
            logps[name] = measure_pairs(
                model, data.eval, loss, batch_size=batch_size, pad_token_id=tokenizer.pad_token_id
            )
            results[name] |= logps[name].scores()
        if settings.generate and rows:
            shown = _with_shots(prompts, data, settings.num_shots) if name == "base" else prompts
            answers[name] = generate_answers(
                model, tokenizer, shown, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
                date=run.date,
            )  # fmt: skip
        del model  # frees it before the next one loads
    for name, rewards in _rewards(run.config, logps).items():
        results[name] |= rewards
    return _record(run.folder, len(held_out), rows, results, answers)


def _rewards(config: RunConfig, logps: Mapping[str, PairLogps]) -> dict[str, dict[str, float]]:
    """Return the implicit rewards of the trained models, if the base is their reference model and was measured too."""
    if "base" not in logps or not uses_reference(config.train.objective) or config.lora.adapter_path is not None:
        return {}
    beta = OBJECTIVES[config.train.objective].settings(config.train)["beta"]
    return {name: each.rewards(logps["base"], beta) for name, each in logps.items() if name != "base"}


def _with_shots(prompts: Sequence[Prompt], data: RunRows, num_shots: int) -> list[Prompt]:
    shots = data.few_shot_examples(num_shots)
    if len(shots) < num_shots:
        logger.warning("base: only %d solved examples, the data has no more of them as text", len(shots))
    return [few_shot_prompt(prompt, shots) for prompt in prompts]


def _record(
    folder: RunFolder,
    num_rows: int,
    rows: Sequence[Example],
    measured: Mapping[str, dict[str, Any]],
    answers: dict[str, list[str]],
) -> dict[str, Any]:
    expected = [example.answer or "" for example in rows]
    before = folder.read_results().get("evaluation", {})
    answers = {**_earlier_answers(folder, rows, expected, before), **answers}
    names = [name for name in MODELS if name in before or name in measured or name in answers]
    names += [name for name in answers if name not in MODELS]
    results: dict[str, Any] = {name: before.get(name, {}) | measured.get(name, {}) for name in names}
    scores = {name: score_answers(expected, generated) for name, generated in answers.items()}
    for name, score in scores.items():
        results[name] |= {
            "exact_match": score.exact_match,
            "valid_json": score.valid_json,
            "field_f1": score.field_f1,
        }
    if {"adapter", "merged"} <= scores.keys():
        results[COMPARISON] = compare_answers(scores["adapter"], scores["merged"])
    if answers:
        lines = [
            json.dumps({"where": example.where, "expected": answer, **{name: answers[name][i] for name in answers}})
            for i, (example, answer) in enumerate(zip(rows, expected, strict=True))
        ]
        atomic_io.write_text(folder.answers_file, "\n".join(lines) + "\n")
    folder.add_results(evaluation={"num_rows": num_rows, **results})
    _print(results, num_rows)
    return results


def _earlier_answers(
    folder: RunFolder, rows: Sequence[Example], expected: Sequence[str], evaluation: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Return the recorded answers to the same rows, by model."""
    if not evaluation or not folder.answers_file.is_file():
        return {}
    lines = [json.loads(line) for line in folder.answers_file.read_text(encoding="utf-8").splitlines()]
    current = [(example.where, answer) for example, answer in zip(rows, expected, strict=True)]
    if [(line["where"], line["expected"]) for line in lines] != current:
        return {}
    return {name: [line[name] for line in lines] for name in lines[0] if name in evaluation}


def _print(results: Mapping[str, Any], num_rows: int) -> None:
    table = Table(title=f"{num_rows} held-out rows", caption="base: answers after solved examples, loss without them")
    table.add_column("model")
    shown = {name: result for name, result in results.items() if name != COMPARISON}
    keys = [key for key in COLUMNS if any(result.get(key) is not None for result in shown.values())]
    for key in keys:
        table.add_column(COLUMNS[key], justify="right")
    for name, result in shown.items():
        table.add_row(name, *(_cell(key, result.get(key)) for key in keys))
    Console().print(table)
    if COMPARISON in results:
        print(f"{COMPARISON}:", ", ".join(f"{key} {value}" for key, value in results[COMPARISON].items()))


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if key in SHARES else f"{value:.4f}"
