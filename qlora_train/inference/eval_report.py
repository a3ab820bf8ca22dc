"""What a finished run achieved: base with a few solved examples, adapter and merged model on the same held-out rows."""

import datetime
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_train.adapters import load_trained
from qlora_train.config import RunConfig
from qlora_train.data.held_out_rows import RunRows
from qlora_train.data.types import Example, Prompt
from qlora_train.evaluation.generation import generate_answers
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.evaluation.scoring import compare_row_by_row, few_shot_prompt, score_answers
from qlora_train.inference.finished_run import existing_models, merged_model
from qlora_train.models import BaseSource, load_model
from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io
from qlora_train.utils.device import free_memory
from qlora_train.utils.errors import DataError

logger = logging.getLogger(__name__)


MODELS = ("base", "adapter", "merged")
ROW_BY_ROW = "rows answered exactly"
"""Title of the comparison of adapter and merged model."""


@dataclass(frozen=True)
class EvalSettings:
    """Which models are measured, how answers are generated and how many examples the base model is shown."""

    models: tuple[str, ...] = MODELS
    num_shots: int = 3
    max_new_tokens: int = 256
    batch_size: int = 32
    generate: bool = True
    date: datetime.date | None = None
    """Day that dated chat templates print: the day the run began; None is today."""


def evaluate_run(
    folder: RunFolder, config: RunConfig, source: BaseSource, data: RunRows, settings: EvalSettings
) -> dict[str, Any]:
    """Measure base, adapter and merged model (where there is one); print a table and record it in results.json.

    Answers go to `answers.jsonl` in the run folder, a line a held-out row. What was measured before of the other models of
    this adapter stays there, and in the table.

    Returns:
        By model name: `loss`, `perplexity`, and for rows with an answer `exact_match`, `valid_json`, `field_f1`.

    Raises:
        DataError: the config has no held-out rows.
        CheckpointError: only the merged model is asked for, and there is none.
    """
    settings = replace(settings, models=existing_models(folder, settings.models))
    if not data.eval:
        raise DataError(
            f"{folder.path}: data.eval is not set, so that there is nothing to evaluate on; set it and train"
        )
    rows = [example for example in data.eval if example.answer is not None]
    settings = settings if rows else replace(settings, generate=False)
    results: dict[str, Any] = {}
    answers: dict[str, list[str]] = {}
    for name, prompts, model, tokenizer in _models(folder, config, source, data, rows, settings):
        logger.info("evaluating: %s", name)
        loss = held_out_loss(
            model, data.eval, batch_size=config.train.per_device_eval_batch_size, pad_token_id=tokenizer.pad_token_id
        )
        results[name] = {"loss": loss.loss, "perplexity": loss.perplexity, "num_tokens": loss.num_tokens}
        if settings.generate:
            answers[name] = generate_answers(
                model,
                tokenizer,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                date=settings.date,
            )
        del model  # the next one is loaded before this name is taken again
    return _record(folder, len(data.eval), rows, results, answers)


def _models(
    folder: RunFolder,
    config: RunConfig,
    source: BaseSource,
    data: RunRows,
    rows: Sequence[Example],
    settings: EvalSettings,
) -> Iterator[tuple[str, list[Prompt], Any, Any]]:
    """Yield the name of each wanted model that there is, its prompts, the model and its tokenizer, one after the other."""
    plain = [example.prompt for example in rows if example.prompt is not None]
    if {"base", "adapter"} & set(settings.models):
        loaded = load_model(config.model, config.quantization, source=source)
        if "base" in settings.models:
            shots = data.few_shot_examples(settings.num_shots)
            if len(shots) < settings.num_shots:
                logger.warning("base: shown %d solved examples, the data has no more of them as text", len(shots))
            shown = [few_shot_prompt(prompt, shots) for prompt in plain]
            yield "base", shown, loaded.model, loaded.tokenizer
        if "adapter" in settings.models:
            yield "adapter", plain, load_trained(loaded, folder.adapter), loaded.tokenizer
        del loaded
        free_memory()
    if "merged" in settings.models:
        yield "merged", plain, *merged_model(folder, trust_remote_code=config.model.trust_remote_code)


def _record(
    folder: RunFolder,
    num_rows: int,
    rows: Sequence[Example],
    results: dict[str, Any],
    answers: dict[str, list[str]],
) -> dict[str, Any]:
    expected = [example.answer or "" for example in rows]
    before = folder.read_results().get("evaluation", {})
    answers = {**_answers_before(folder, rows, expected, before), **answers}
    measured = {name: {**before.get(name, {}), **result} for name, result in results.items()}
    kept = {name: before[name] for name in MODELS if name in before}
    results = {name: {**kept, **measured}[name] for name in MODELS if name in kept or name in measured}
    scores = {name: score_answers(expected, given) for name, given in answers.items()}
    for name, score in scores.items():
        results[name] |= {
            "exact_match": score.exact_match,
            "valid_json": score.valid_json,
            "field_f1": score.field_f1,
        }
    if {"adapter", "merged"} <= scores.keys():
        comparison = compare_row_by_row(scores["adapter"], scores["merged"])
        results[ROW_BY_ROW] = {
            "both": comparison.both,
            "only the adapter": comparison.only_first,
            "only the merged model": comparison.only_second,
            "neither": comparison.neither,
        }
    lines = [
        json.dumps({"where": example.where, "expected": wanted, **{name: answers[name][i] for name in answers}})
        for i, (example, wanted) in enumerate(zip(rows, expected, strict=True))
    ]
    if answers:
        atomic_io.write_text(folder.answers_file, "\n".join(lines) + "\n")
    folder.add_results(evaluation={"num_rows": num_rows, **results})
    _print(results, num_rows)
    return results


def _answers_before(
    folder: RunFolder, rows: Sequence[Example], expected: Sequence[str], evaluation: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Return the answers of models that were measured before on the same rows, by model."""
    if not evaluation or not folder.answers_file.is_file():
        return {}
    lines = [json.loads(line) for line in folder.answers_file.read_text(encoding="utf-8").splitlines()]
    wanted = [(example.where, answer) for example, answer in zip(rows, expected, strict=True)]
    if [(line["where"], line["expected"]) for line in lines] != wanted:
        return {}
    return {name: [line[name] for line in lines] for name in MODELS if name in evaluation and name in lines[0]}


def _print(results: dict[str, Any], num_rows: int) -> None:
    table = Table(title=f"{num_rows} held-out rows", caption="base: answers after solved examples, loss without them")
    columns = {
        "loss": "loss",
        "perplexity": "perplexity",
        "exact_match": "exact match",
        "field_f1": "field F1",
        "valid_json": "valid JSON",
    }
    table.add_column("model")
    for title in columns.values():
        table.add_column(title, justify="right")
    for name, result in results.items():
        if "loss" in result:
            table.add_row(name, *(_cell(key, result.get(key)) for key in columns))
    Console().print(table)
    if ROW_BY_ROW in results:
        print(f"{ROW_BY_ROW}:", ", ".join(f"{key} {value}" for key, value in results[ROW_BY_ROW].items()))


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if key in ("exact_match", "valid_json") else f"{value:.4f}"
